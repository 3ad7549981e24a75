"""Reads and writes checkpoints on disk."""
