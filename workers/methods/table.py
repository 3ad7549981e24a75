"""The table of methods: one row for each way to choose codes on an integer grid. Their needs are in their recipes.

To add a method, add a recipe class (``spec.recipes``), its numerics, a module here with its solver, and a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.methods import awq, gptq, hqq, rtn, smoothquant
from workers.methods.layer import FoldableInput, Solved, Stack, Stacked
from workers.numerics.grids import Nearest
from workers.spec import plugins
from workers.spec.recipe_base import RecipeBase
from workers.spec.recipes import (
    AwqRecipe,
    GptqRecipe,
    HqqRecipe,
    PluginRecipe,
    RtnRecipe,
    SmoothQuantRecipe,
)


@dataclass(frozen=True)
class Method:
    """One method: its recipe, its solver on integer grids, and the function that chooses the scales of foldable inputs,
    if any. ``values`` solves on a grid of floats, given scales [B, O, G] and what rounds to it (None: nearest values).
    """

    recipe: type[RecipeBase]
    solve: Callable[[Any, Stack], Solved]
    input_scales: Callable[[Any, FoldableInput], Tensor] | None = None
    values: Callable[[Any, Stacked, Tensor, Nearest], tuple[Tensor, Sequence[tuple[str, ...]]]] | None = None


METHODS: dict[str, Method] = {
    "gptq": Method(GptqRecipe, gptq.solve, values=gptq.values),
    "rtn": Method(RtnRecipe, rtn.solve),
    "awq": Method(AwqRecipe, awq.solve, awq.input_scales),
    "smoothquant": Method(SmoothQuantRecipe, rtn.solve, smoothquant.input_scales),
    "hqq": Method(HqqRecipe, hqq.solve),
}
METHODS |= {name: Method(PluginRecipe, plugins.resolved(added.solver)) for name, added in plugins.METHODS.items()}
