"""AWQ (arXiv 2306.00978): scales of input channels and clipped ranges that minimize the output error."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.methods.layer import FoldableInput, Solved, Stack
from workers.model.loading import InputName, QuantizableWeight
from workers.model.statistics import InputStatistics
from workers.numerics import awq, rounding
from workers.spec.recipes import AwqRecipe
from workers.spec.schemes import IntScheme


def solve(recipe: AwqRecipe, stack: Stack) -> Solved:
    """Codes of already scaled weights, with clipped ranges if ``clip`` is set."""
    scheme, w_BOI = stack.scheme, stack.w_BOI
    if recipe.options.clip:
        scale_BOG, zero_BOG = awq.clipped_params(
            w_BOI, stack.hessians, scheme.bits, scheme.group_size, symmetric=scheme.symmetric,
            scale_dtype=stack.scale_dtype,
        )  # fmt: skip
    else:
        scale_BOG, zero_BOG = rounding.minmax_params(
            w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=stack.scale_dtype
        )
    zero_BOG = stack.as_stored(scale_BOG, zero_BOG)
    return Solved(rounding.quantize(w_BOI, scale_BOG, zero_BOG, scheme.bits), scale_BOG, zero_BOG)


def input_scales(recipe: AwqRecipe, foldable: FoldableInput) -> Tensor:
    """s of the input, float32 [I]: the mean activation to the exponent that minimizes the output error."""
    problems: dict[InputName, list[tuple[QuantizableWeight, InputStatistics]]] = {}
    for weight, statistics in foldable.seen:
        name = weight.input if weight.input.expert is not None else InputName("", None)
        problems.setdefault(name, []).append((weight, statistics))
    tokens = sum(group[0][1].count for group in problems.values())
    mean_I = torch.stack([group[0][1].abs_sum_I for group in problems.values()]).sum(0) / max(tokens, 1)
    scheme = foldable.scheme
    assert isinstance(scheme, IntScheme)
    stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for group in problems.values():
        w_OI = torch.cat([foldable.read(weight).float() for weight, _ in group])
        stacks.setdefault(tuple(w_OI.shape), []).append((w_OI, group[0][1].gram_II))
    stacked = [(torch.stack([w for w, _ in stack]), torch.stack([h for _, h in stack])) for stack in stacks.values()]
    weight_mean_I = awq.weight_means([w_BOI for w_BOI, _ in stacked], scheme.group_size)
    return awq.input_scales(
        stacked,
        foldable.tied(mean_I, "mean"),
        foldable.tied(weight_mean_I, "mean"),
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        grid=recipe.options.grid,
    )
