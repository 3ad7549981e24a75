"""Run zoos as Ray jobs: pack, submit, follow and cancel them."""
