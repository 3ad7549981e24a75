"""Zoo files, and what is shipped for them."""
