"""Runs as Ray jobs: packed, submitted, followed."""
