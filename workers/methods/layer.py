"""A method's view of one layer: its weights, the statistics of their inputs, and the resulting codes.

B problems, O output features, I input features, G groups of input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from workers.errors import NumericalError
from workers.model.cards import CardThread
from workers.model.folding import Fold
from workers.model.loading import QuantizableWeight
from workers.model.statistics import InputStatistics, Statistics
from workers.model.upload import LayerTensors
from workers.numerics import gptq, rounding
from workers.numerics.codes import CodedWeight
from workers.numerics.waits import brought, magnitudes
from workers.spec.schemes import IntScheme, LinearScheme

Key = tuple[tuple[int, ...], bool, float]
# Largest magnitude of weights that stay finite in float32 whatever scales are folded into them.
UNSCALED = 1e15


class Factors:
    """Cache of a layer's GPTQ factors; freed with the layer."""

    def __init__(self) -> None:
        self._factors: dict[Key, tuple[tuple[InputStatistics, ...], gptq.Factor]] = {}

    def of(
        self, statistics: tuple[InputStatistics, ...], h_BII: Tensor, *, activation_order: bool, damping: float
    ) -> gptq.Factor:
        """The factor of some inputs' Hessians, stacked as ``h_BII``.

        Raises:
            gptq.NotPositiveDefinite: as ``gptq.factorize``.
        """
        key = (tuple(map(id, statistics)), activation_order, damping)
        if key not in self._factors:
            factor = gptq.factorize(h_BII, activation_order=activation_order, damping=damping)
            # Holding the statistics keeps their ids from being reused.
            self._factors[key] = (statistics, factor)
        return self._factors[key][1]


class Finite:
    """Which of a layer's weights hold NaN or Inf: asked of the device once for all recipes, in one wait."""

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def ask(self, tensors: Mapping[str, Tensor]) -> None:
        """Find the largest magnitudes of tensors that nobody asked for yet."""
        unknown = [key for key in tensors if key not in self._largest]
        self._largest |= zip(unknown, magnitudes([tensors[key] for key in unknown]), strict=True)

    def require(self, key: str, tensor: Tensor) -> Tensor:
        """Return the tensor of that key unchanged.

        Raises:
            NumericalError: it contains NaN or Inf.
        """
        self.ask({key: tensor})
        if not math.isfinite(self._largest[key]):
            raise broken(key)
        return tensor

    def require_scaled(self, key: str, scaled: Tensor) -> Tensor:
        """Return what scales made of the tensor of that key, unchanged.

        Raises:
            NumericalError: it contains NaN or Inf.
        """
        # Scales are far from 1e10, so what they make of numbers this small is finite.
        return scaled if self._largest.get(key, math.inf) < UNSCALED else require_finite(key, scaled)


@dataclass(frozen=True)
class LayerWork:
    """One layer as given to all makers: its checkpoint tensors and observations.

    ``observer`` is None in a pass without calibration; ``folds`` are the layer's proven folds; ``factors`` are shared
    by the recipes that solve under the same statistics, ``finite`` by all. A maker that has several cards for this
    layer divides its problems among ``cards``: each with its thread, and the same layer there; with none it solves them
    itself.
    """

    index: int
    tensors: LayerTensors
    observer: Statistics | None = None
    folds: Sequence[Fold] = ()
    factors: Factors = field(default_factory=Factors)
    finite: Finite = field(default_factory=Finite)
    cards: Sequence[tuple[CardThread, LayerWork]] = ()


@dataclass(frozen=True)
class Coded:
    """The codes of one weight, and its deviations from the recipe."""

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
    """A layer as a method sees it.

    ``read`` returns a weight as float [O, I], all finite; ``statistics`` those of its input; ``dtype`` is the
    checkpoint's.
    """

    read: Callable[[QuantizableWeight], Tensor]
    statistics: Callable[[QuantizableWeight], InputStatistics | None]
    dtype: torch.dtype
    factors: Factors


@dataclass(frozen=True)
class Stacked:
    """Problems of one shape, solved together; ``w_BOI`` is float, ``factors`` are the layer's."""

    problems: Sequence[Problem]
    w_BOI: Tensor
    factors: Factors

    @property
    def hessians(self) -> Tensor:
        """X^T X of each problem's input, float32; zeros if it received no tokens."""
        first = self.problems[0]
        if len(self.problems) == 1 and first.statistics is not None:
            return first.statistics.gram_II[None]
        width = first.matrix_OI.shape[1]
        unseen = first.matrix_OI.new_zeros(width, width, dtype=torch.float32)
        return torch.stack([unseen if p.statistics is None else p.statistics.gram_II for p in self.problems])


@dataclass(frozen=True)
class Stack(Stacked):
    """Problems of one integer scheme; scales are rounded to ``scale_dtype``.

    ``real_zeros``: zero points are stored as biases in that dtype, and needn't be integers.
    """

    scheme: IntScheme
    scale_dtype: torch.dtype
    real_zeros: bool = False

    def as_stored(self, scale_BOG: Tensor, zero_BOG: Tensor | None) -> Tensor | None:
        """The zero points that are read back once these are stored."""
        if zero_BOG is None or not self.real_zeros:
            return zero_BOG
        return rounding.stored_zero(scale_BOG, zero_BOG, self.scheme.bits)


@dataclass(frozen=True)
class Solved:
    """The codes of a stack, int8 [B, O, I], its scales and zero points, and each problem's notes (empty if none)."""

    codes_BOI: Tensor
    scale_BOG: Tensor
    zero_BOG: Tensor | None
    notes: Sequence[tuple[str, ...]] = ()


@dataclass(frozen=True)
class FoldableInput:
    """An input whose scales can be folded into the preceding module.

    ``rows_I`` (int64, on the CPU) is the source channel of each column; ``seen`` are the weights that multiply the
    input and have statistics; ``sinks`` are all weights that multiply it; ``read`` returns a weight as [O, I] in its
    stored dtype.
    """

    rows_I: Tensor
    seen: Sequence[tuple[QuantizableWeight, InputStatistics]]
    sinks: Sequence[QuantizableWeight]
    scheme: LinearScheme
    read: Callable[[QuantizableWeight], Tensor]

    def tied(self, values_I: Tensor, how: Literal["mean", "max"]) -> Tensor:
        """Give columns of one source channel the same value: their mean, or their maximum.

        Summed in the order of the columns on every device: a scatter's atomic additions on a card have no order.
        """
        if torch.equal(self.rows_I, torch.arange(len(values_I))):
            return values_I  # each has a channel of its own
        # Found on the CPU, where that waits for nothing; what is checked there is right, so ``unsafe`` leaves it out.
        order_I, lengths = self.rows_I.argsort(stable=True), torch.bincount(self.rows_I)
        there = values_I.device
        sorted_I = values_I[brought(order_I, there)]
        each = torch.segment_reduce(sorted_I, how, lengths=brought(lengths, there), axis=0, unsafe=True)
        return each[brought(self.rows_I, there)]


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """Return the tensor unchanged.

    Raises:
        NumericalError: it contains NaN or Inf.
    """
    if not math.isfinite(magnitudes([tensor])[0]):
        raise broken(key)
    return tensor


def broken(key: str) -> NumericalError:
    """The error of a weight that holds NaN or Inf."""
    return NumericalError(f"weights: NaN or Inf in {key}; its source is broken: name another, or leave it out")
