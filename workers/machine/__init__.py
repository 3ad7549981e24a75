"""Machine-level services: fresh processes, and warm parents that they are forked from. No torch at import."""
