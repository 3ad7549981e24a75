"""A worker's requests and answers: plain values and tables. No torch, no Ray, no I/O except reading."""
