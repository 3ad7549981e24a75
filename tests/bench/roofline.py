"""Seconds that the arithmetic of a layer takes on a card, at half of an H100's peak rates, and no less.

O output features, I input features, T tokens. Forwards and X^T X are products in bfloat16, solvers' in TF32.
"""

from __future__ import annotations

from collections.abc import Iterable

# Half of the peaks that NVIDIA states for the H100 (SXM, dense): operations per second, bytes per second.
BF16, TF32, MEMORY = 495e12, 247e12, 1.67e12
ROUNDS = 3
# Scales that AWQ's search compares, at least: the weights' own, and about half of two families of twenty.
CANDIDATES = 20
# Times that a search for scales, or rounding, reads or writes a float32 for a weight.
PASSES = 20
# Stated, not measured: seconds of the processor for a launch, and of a wait beyond what is waited for.
LAUNCH, WAIT = 5e-6, 20e-6
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


def products(recipe: str, shapes: Shapes) -> float:
    """Operations of a recipe's own products for a layer, its inputs' factors not included."""
    whole = sum(outputs * inputs**2 for outputs, inputs in shapes)
    of = {
        "gptq": 1 + 3 * ROUNDS,  # GPTQ, and rounds of a sweep and of the best scales
        "nvfp4": 1 + 2 * ROUNDS,  # scales stay
        "mxfp4": 1 + 2 * ROUNDS,
        "awq": 2 * CANDIDATES,  # each candidate's error by H
    }
    return of.get(recipe.partition("-")[0], 0) * whole


def recipe(name: str, shapes: Shapes) -> float:
    """A layer under a recipe."""
    shapes = list(shapes)
    return products(name, shapes) / TF32 + sum(search(*shape) for shape in shapes)


def forward(shapes: Shapes, tokens: int, length: int, hidden: int) -> float:
    """All tokens through a layer: its weights, and attention in sequences of ``length``."""
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    return (2 * tokens * weights + 2 * tokens * length * hidden) / BF16


def statistics(inputs: Iterable[int], tokens: int) -> float:
    """X^T X of each distinct input, which is symmetric."""
    return sum(tokens * width**2 for width in inputs) / BF16
