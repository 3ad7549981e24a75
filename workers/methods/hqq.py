"""HQQ (Badri and Shaji, 2023): zero points that minimize an l_p norm of the weights' error."""

from __future__ import annotations

from workers.methods.layer import Solved, Stack
from workers.numerics import hqq, rounding
from workers.spec.recipes import HqqRecipe


def solve(recipe: HqqRecipe, stack: Stack) -> Solved:
    """Codes under half-quadratic scales and zero points; needs no calibration."""
    scheme, options = stack.scheme, recipe.options
    scale_BOG, zero_BOG = hqq.params(
        stack.w_BOI, scheme.bits, scheme.group_size, scale_dtype=stack.scale_dtype, iterations=options.iterations,
        norm=options.norm,
    )  # fmt: skip
    stored_BOG = stack.as_stored(scale_BOG, zero_BOG)
    return Solved(rounding.quantize(stack.w_BOI, scale_BOG, stored_BOG, scheme.bits), scale_BOG, stored_BOG)
