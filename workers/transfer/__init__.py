"""Transfers files: the Hub, folders, shared storage, and the destinations of artifacts. No torch."""
