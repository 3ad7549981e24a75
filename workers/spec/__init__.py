"""What is asked of a worker and what it answers: plain values and rows. No torch, no Ray, no I/O but reading."""
