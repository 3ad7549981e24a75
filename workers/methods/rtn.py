"""Round to nearest: rounds each weight to the closest code in its group's range."""

from __future__ import annotations

from workers.methods.layer import Solved, Stack
from workers.numerics import rounding
from workers.spec.recipes import RtnRecipe, SmoothQuantRecipe


def solve(recipe: RtnRecipe | SmoothQuantRecipe, stack: Stack) -> Solved:
    """Codes in the range chosen by ``recipe.options.scales``; SmoothQuant's weights are already scaled."""
    scheme = stack.scheme
    params = rounding.mse_params if recipe.options.scales == "mse" else rounding.minmax_params
    scale_BOG, zero_BOG = params(
        stack.w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=stack.scale_dtype
    )
    zero_BOG = stack.as_stored(scale_BOG, zero_BOG)
    return Solved(rounding.quantize(stack.w_BOI, scale_BOG, zero_BOG, scheme.bits), scale_BOG, zero_BOG)
