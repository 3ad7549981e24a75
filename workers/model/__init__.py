"""A model streamed layer by layer, and what is seen of it."""
