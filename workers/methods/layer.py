"""What a method sees of one layer: its weights, the statistics of their inputs, and what it makes of them.

B problems, O output features, I input features, G groups of input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.errors import NumericalError
from workers.model.folding import Fold
from workers.model.loading import QuantizableWeight
from workers.model.statistics import InputStatistics, Observer
from workers.numerics import gptq
from workers.numerics.codes import CodedWeight
from workers.spec.schemes import IntScheme, LinearScheme

Key = tuple[tuple[int, ...], bool, float]


class Factors:
    """A layer's factors, each made once; they are let go with the layer."""

    def __init__(self) -> None:
        self._made: dict[Key, tuple[tuple[InputStatistics, ...], gptq.Factor]] = {}

    def of(
        self, statistics: tuple[InputStatistics, ...], h_BII: Tensor, *, activation_order: bool, damping: float
    ) -> gptq.Factor:
        """The factor of some inputs' Hessians, stacked as ``h_BII``.

        Raises:
            gptq.NotPositiveDefinite: as ``gptq.factorize``.
        """
        key = (tuple(map(id, statistics)), activation_order, damping)
        if key not in self._made:
            factor = gptq.factorize(h_BII, activation_order=activation_order, damping=damping)
            # The statistics are held, so that their ids stay their own.
            self._made[key] = (statistics, factor)
        return self._made[key][1]


@dataclass(frozen=True)
class LayerWork:
    """One layer as all makers get it: its checkpoint tensors, and what was seen of it.

    ``observer`` is None in a pass without calibration; ``folds`` are those that a probe of the layer has proven;
    ``factors`` are shared by the recipes that solve under the same statistics.
    """

    index: int
    tensors: Mapping[str, Tensor]
    observer: Observer | None = None
    folds: Sequence[Fold] = ()
    factors: Factors = field(default_factory=Factors)


@dataclass(frozen=True)
class Coded:
    """The codes of one weight, and what had to be done otherwise than the recipe says."""

    weight: QuantizableWeight
    codes: CodedWeight
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Weights with one input and one scheme, their rows stacked."""

    weights: tuple[QuantizableWeight, ...]
    scheme: LinearScheme
    matrix_OI: Tensor
    statistics: InputStatistics | None


@dataclass(frozen=True)
class Layer:
    """What a method sees of a layer.

    ``read`` gives a weight as float [O, I]; ``statistics`` those of its input; ``dtype`` is the checkpoint's.
    """

    read: Callable[[QuantizableWeight], Tensor]
    statistics: Callable[[QuantizableWeight], InputStatistics | None]
    dtype: torch.dtype
    factors: Factors


@dataclass(frozen=True)
class Stack:
    """Problems of one shape and one integer scheme, solved together; ``w_BOI`` is float.

    Scales are to be rounded to ``scale_dtype``; ``factors`` are the layer's.
    """

    problems: Sequence[Problem]
    scheme: IntScheme
    w_BOI: Tensor
    scale_dtype: torch.dtype
    factors: Factors

    @property
    def hessians(self) -> Tensor:
        """X^T X of each problem's input, float32; zeros where nothing came in."""
        first = self.problems[0]
        if len(self.problems) == 1 and first.statistics is not None:
            return first.statistics.gram_II[None]
        width = first.matrix_OI.shape[1]
        unseen = first.matrix_OI.new_zeros(width, width, dtype=torch.float32)
        return torch.stack([unseen if p.statistics is None else p.statistics.gram_II for p in self.problems])


@dataclass(frozen=True)
class Solved:
    """The codes of a stack, int8 [B, O, I], its scales and zero points, and notes for each problem, empty for none."""

    codes_BOI: Tensor
    scale_BOG: Tensor
    zero_BOG: Tensor | None
    notes: Sequence[tuple[str, ...]] = ()


@dataclass(frozen=True)
class FoldableInput:
    """An input whose scales can be moved into what comes before it.

    ``rows_I`` says which channel of the source each column comes from; ``seen`` are the weights that multiply it, with
    statistics; ``sinks`` are all of them; ``read`` gives a weight as [O, I] in its stored dtype.
    """

    rows_I: Tensor
    seen: Sequence[tuple[QuantizableWeight, InputStatistics]]
    sinks: Sequence[QuantizableWeight]
    scheme: LinearScheme
    read: Callable[[QuantizableWeight], Tensor]

    def tied(self, values_I: Tensor, how: str) -> Tensor:
        """One value for all columns that come from one channel of the source: their mean, or their largest (amax)."""
        rows_I = self.rows_I.to(values_I.device)
        of_rows = values_I.new_zeros(int(rows_I.max()) + 1)
        return of_rows.scatter_reduce_(0, rows_I, values_I, how, include_self=False)[rows_I]


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        NumericalError: it holds NaN or Inf.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"weights: NaN or Inf in {key}; the checkpoint is broken, fetch it again")
    return tensor
