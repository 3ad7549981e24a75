"""Grids that weights are rounded to: whole numbers, and floats of few bits. A grid rounds a tensor in place.

Grids are described by numbers, so that a kernel rounds to them by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Rounds a tensor in place to the numbers of a grid.
Nearest = Callable[[Tensor], Tensor]
EXPONENT = 0x7F800000  # its bits in a float32


@dataclass(frozen=True)
class Integers:
    """The whole numbers from ``low`` to ``high``; ties go to the even one."""

    low: int
    high: int

    def __call__(self, value: Tensor) -> Tensor:
        return value.round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class Floats:
    """Floats of few bits up to ``largest``; ties go to the even code. ``value`` to round: float32.

    Neighbours are ``share`` of a power of two apart: of the one at or below the number, from ``first`` (the smallest
    normal number; below it they are as far apart) to ``last``.
    """

    first: float
    last: float
    share: float
    largest: float

    def __call__(self, value: Tensor) -> Tensor:
        # Even codes are even multiples of the step between neighbours, so rounding half to even is a tie to the even.
        step = value.abs().clamp_(self.first, self.last)
        step.view(torch.int32).bitwise_and_(EXPONENT)
        step.mul_(self.share)
        return value.div_(step).round_().mul_(step).clamp_(-self.largest, self.largest)

    def magnitudes(self, value: Tensor) -> Tensor:
        """Round numbers that aren't negative, in place: to the same numbers in half the operations."""
        # Up to the largest number the steps are those of its octave, so only the first needs a bound.
        step = value.clamp_(max=self.largest).clamp(min=self.first)
        step.view(torch.int32).bitwise_and_(EXPONENT)
        # 1.5 x 2^23 steps: a float32 of that size has whole steps, and rounds to them, ties to even.
        steps = self.share * 1.5 * (1 << 23)
        return value.add_(step, alpha=steps).sub_(step, alpha=steps)


# OCP Microscaling Formats 1.0, section 5.3.
E2M1 = Floats(first=1, last=4, share=1 / 2, largest=6)
E4M3 = Floats(first=2**-6, last=2**8, share=1 / 8, largest=448)
