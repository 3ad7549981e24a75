"""Seconds that the arithmetic of a layer takes on a card, at half of an H100's peak rates, and no less.

O output features, I input features, T tokens. Forwards and X^T X are products in bfloat16, solvers' in TF32.
"""

from __future__ import annotations

from collections.abc import Iterable

# Half of the peaks that NVIDIA states for the H100 (SXM, dense): operations per second, bytes per second.
BF16, TF32, MEMORY = 495e12, 247e12, 1.67e12
ROUNDS = 3
# Scales that AWQ's search compares: the weights' own, and of two families of twenty a dozen each.
CANDIDATES = 25
# Times that a search for scales, or rounding, reads or writes a float32 for a weight.
PASSES = 20
Shapes = Iterable[tuple[int, int]]


def factorize(inputs: int) -> float:
    """A Cholesky factor of H."""
    return inputs**3 / 3 / TF32


def gptq(outputs: int, inputs: int) -> float:
    """GPTQ: of the products of errors and a triangle."""
    return outputs * inputs**2 / TF32


def refinement(outputs: int, inputs: int) -> float:
    """Rounds of a sweep (errors by H) and of the best scales (normal equations, symmetric)."""
    return ROUNDS * 3 * outputs * inputs**2 / TF32


def search(outputs: int, inputs: int) -> float:
    """A search for scales."""
    return PASSES * 4 * outputs * inputs / MEMORY


def solved(shapes: Shapes) -> float:
    """A layer under GPTQ with refinement, its inputs' factors not included."""
    return sum(gptq(*shape) + refinement(*shape) + search(*shape) for shape in shapes)


def awq(shapes: Shapes) -> float:
    """A layer under AWQ: each candidate's error by H."""
    return sum(CANDIDATES * 2 * outputs * inputs**2 / TF32 + search(outputs, inputs) for outputs, inputs in shapes)


def forward(shapes: Shapes, tokens: int, length: int, hidden: int) -> float:
    """All tokens through a layer: its weights, and attention in sequences of ``length``."""
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    return (2 * tokens * weights + 2 * tokens * length * hidden) / BF16


def statistics(inputs: Iterable[int], tokens: int) -> float:
    """X^T X of each distinct input, which is symmetric."""
    return sum(tokens * width**2 for width in inputs) / BF16
