"""SmoothQuant (arXiv 2211.10438): moves activation outliers into the weights, which are then rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.methods.layer import FoldableInput
from workers.numerics import smoothing
from workers.spec.recipes import SmoothQuantRecipe


def input_scales(recipe: SmoothQuantRecipe, foldable: FoldableInput) -> Tensor:
    """s of the input, float32 [I]: from the largest activation and the largest weight of each column (eq. 4)."""
    input_max_I = torch.stack([statistics.abs_max_I for _, statistics in foldable.seen]).amax(0)
    weight_max_I = torch.stack([foldable.read(weight).abs().amax(0) for weight in foldable.sinks]).amax(0)
    return smoothing.scales(
        foldable.tied(input_max_I, "max"), foldable.tied(weight_max_I.float(), "max"), recipe.options.strength
    )
