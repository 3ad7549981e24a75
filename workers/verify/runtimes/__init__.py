"""The runtimes that users load checkpoints with; each runs in its own process."""
