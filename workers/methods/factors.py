"""Factors of Hessians, shared by the recipes that solve under the same statistics in the same order."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics import gptq
from workers.statistics import InputStatistics

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


def hessians(statistics: tuple[InputStatistics, ...]) -> Tensor:
    """X^T X of some inputs, float32 [B, I, I]; one alone is not copied."""
    if len(statistics) == 1:
        return statistics[0].gram_II[None]
    return torch.stack([found.gram_II for found in statistics])
