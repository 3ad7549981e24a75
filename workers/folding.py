"""Which channels of a layer can be rescaled without changing what it computes: pairs of a source and its sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.loading import QuantizableWeight

FoldKind = Literal["norm", "unit-offset-norm", "linear"]


@dataclass(frozen=True)
class Sink:
    """A parameter of the model, by its name there, whose input columns are multiplied; one expert of it, or all."""

    weight: str
    expert: int | None


@dataclass(frozen=True)
class Fold:
    """A source that is divided, and all the sinks that undo it; ``rows_I`` (int64): each column's channel of the source.

    ``source`` names the module, or for an expert of a fused parameter that parameter.
    """

    source: str
    kind: FoldKind
    expert: int | None
    rows_I: Tensor
    sinks: tuple[Sink, ...]


def find_folds(
    layer: nn.Module, prefix: str, run: Callable[[], Any], targets: Sequence[QuantizableWeight]
) -> list[Fold]:
    """The folds of a loaded layer."""
    return []


def fold_source(
    kind: FoldKind, weight: Tensor, bias: Tensor | None, s_I: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide a source by s_I in its stored dtype: weight, bias, and the s_I that rounding made of it."""
    offset = 1.0 if kind == "unit-offset-norm" else 0.0
    new = ((weight.float() + offset) / s_I - offset).to(weight.dtype)
    made = new.float() + offset
    effective = torch.where(made == 0, s_I, (weight.float() + offset) / made)
    return new, None if bias is None else (bias.float() / effective).to(bias.dtype), effective
