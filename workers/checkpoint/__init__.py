"""Checkpoints on disk: tensors read and written."""
