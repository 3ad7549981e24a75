"""The runtimes that users load checkpoints with, each asked in a process of its own."""
