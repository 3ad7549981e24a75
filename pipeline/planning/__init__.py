"""What a run will make: models and data pinned, sizes, what is there already."""
