"""Plan a run: pin models and data, estimate sizes, skip what exists already, and build the jobs."""
