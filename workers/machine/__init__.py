"""The machine a worker runs on: fresh processes, and the parents that they start warm from. No torch at import."""
