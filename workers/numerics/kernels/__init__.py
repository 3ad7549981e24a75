"""Kernels for a card, each with the same operation in PyTorch beside it: the loop that it stands for is its oracle."""
