"""FP8 E4M3 (arXiv 2209.05433): eight bits with an exponent, and the scales that go with them.

O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

BLOCK = 128


def dequantize(values_OI: Tensor, scale: Tensor, *, blocks: bool) -> Tensor:
    """The weights that values stand for, float32 [O, I]; ``scale`` [1], [O, 1], or one for each 128 x 128 block."""
    if blocks:
        rows, columns = values_OI.shape
        scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values_OI.float() * scale.float()
