"""GPTQ (arXiv 2210.17323): quantizes column after column under the Hessian of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from workers.errors import NumericalError
from workers.methods.layer import Problem, Solved, Stack, Stacked
from workers.numerics import gptq, refine, rounding
from workers.numerics.grids import Nearest
from workers.spec.recipes import GptqRecipe


class _Refinement(TypedDict):
    bits: int
    rounds: int
    damping: float


def solve(recipe: GptqRecipe, stack: Stack) -> Solved:
    """Codes by GPTQ, refined if ``refine`` is set.

    Raises:
        NumericalError: the statistics stay indefinite under any damping.
    """
    options, scheme, w_BOI, h_BII = recipe.options, stack.scheme, stack.w_BOI, stack.hessians
    importance_BI = h_BII.diagonal(dim1=1, dim2=2) if options.scales == "mse" else None
    search = rounding.minmax_params if importance_BI is None else rounding.mse_params
    weighing = {} if importance_BI is None else {"importance_I": _nonzero(importance_BI)}
    scale_BOG, zero_BOG = search(
        w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=stack.scale_dtype, **weighing
    )
    zero_BOG = stack.as_stored(scale_BOG, zero_BOG)
    factor = _factor(recipe, stack, h_BII)
    codes_BOI = gptq.solve(w_BOI, factor, scale_BOG, zero_BOG, bits=scheme.bits)
    if options.refine:
        how: _Refinement = {"bits": scheme.bits, "rounds": options.refine, "damping": options.damping}
        if zero_BOG is not None and stack.real_zeros:
            codes_BOI, scale_BOG, zero_BOG = refine.refine_biased(w_BOI, h_BII, codes_BOI, scale_BOG, zero_BOG, **how)
        else:
            codes_BOI, scale_BOG = refine.refine(w_BOI, h_BII, codes_BOI, scale_BOG, zero_BOG, **how)
    notes = [_notes(recipe, problem, used) for problem, used in zip(stack.problems, factor.damping_B, strict=True)]
    return Solved(codes_BOI, scale_BOG, zero_BOG, notes)


def values(
    recipe: GptqRecipe, stack: Stacked, scale_BOG: Tensor, nearest: Nearest
) -> tuple[Tensor, Sequence[tuple[str, ...]]]:
    """Values of the grid that ``nearest`` rounds to, float32 [B, O, I], for given scales, and each problem's notes.

    Raises:
        NumericalError: the statistics stay indefinite under any damping.
    """
    options, w_BOI, h_BII = recipe.options, stack.w_BOI, stack.hessians
    factor = _factor(recipe, stack, h_BII)
    values_BOI = gptq.solve_values(w_BOI, factor, scale_BOG, nearest)
    if options.refine:
        values_BOI = refine.descend(
            w_BOI, h_BII, values_BOI, scale_BOG, nearest, rounds=options.refine, damping=options.damping
        )
    notes = [_notes(recipe, problem, used) for problem, used in zip(stack.problems, factor.damping_B, strict=True)]
    return values_BOI, notes


def _factor(recipe: GptqRecipe, stack: Stacked, h_BII: Tensor) -> gptq.Factor:
    options = recipe.options
    seen = tuple(problem.statistics for problem in stack.problems if problem.statistics is not None)
    try:
        if len(seen) == len(stack.problems):
            return stack.factors.of(seen, h_BII, activation_order=options.activation_order, damping=options.damping)
        return gptq.factorize(h_BII, activation_order=options.activation_order, damping=options.damping)
    except gptq.NotPositiveDefinite as error:
        key = stack.problems[0].weights[0].key
        raise NumericalError(f"gptq: {key}: {error}; calibrate on other text") from error


def _nonzero(importance_BI: Tensor) -> Tensor:
    """Use equal importance for inputs that received no tokens."""
    return torch.where((importance_BI > 0).any(-1, keepdim=True), importance_BI, 1.0)


def _notes(recipe: GptqRecipe, problem: Problem, damping: float) -> tuple[str, ...]:
    wanted, name, notes = recipe.options.damping, problem.weights[0].module, []
    if damping > wanted:
        notes.append(f"damping raised from {wanted:g} to {damping:g} for {name}: H wasn't positive definite")
    if problem.statistics is None or problem.statistics.count == 0:
        notes.append(f"rounded to nearest, for no calibration token came to it: {name}")
    return tuple(notes)
