"""FP8 E4M3 (arXiv 2209.05433): rounding to eight-bit floats, and their scales.

O output features, I input features; P, Q blocks of output and input features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0


def quantize(
    w_OI: Tensor,
    scales: Literal["tensor", "channel", "block"],
    scale_dtype: torch.dtype = torch.float32,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest values, float8_e4m3fn [O, I], and their scale in ``scale_dtype``: [1], [O, 1] or [P, Q].

    A scale is the largest magnitude over 448. It is rounded to ``scale_dtype`` before the values are computed, so that
    readers multiply by the same number that was divided by. All-zero weights stay zero. ``largest`` is the magnitude
    (any shape, one element) that a tensor's scale is made for, instead of its own.
    """
    w_OI = w_OI.float()
    match scales:
        case "tensor":
            largest = (w_OI.abs().amax() if largest is None else largest.float()).reshape(1)
        case "channel":
            largest = w_OI.abs().amax(-1, keepdim=True)
        case "block":
            largest = _block_maxima(w_OI)
    scale = nonzero((largest / LARGEST).to(scale_dtype))
    return to_e4m3(w_OI / _expanded(scale.float(), w_OI, blocks=scales == "block")), scale


def input_scale(abs_max: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The static scale [1] of a layer's input with the largest magnitudes ``abs_max`` (any shape)."""
    return nonzero((abs_max.float().amax() / LARGEST).to(scale_dtype).reshape(1))


def dequantize(values_OI: Tensor, scale: Tensor, *, blocks: bool) -> Tensor:
    """The decoded weights, float32 [O, I]; ``scale`` [1], [O, 1], or one for each 128 x 128 block."""
    return values_OI.float() * _expanded(scale.float(), values_OI, blocks=blocks)


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3, ties to even; clamped to 448, since the format has no infinity and a cast would give NaN."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def nonzero(scale: Tensor) -> Tensor:
    """``scale`` with zeros replaced by its dtype's epsilon, as in compressed-tensors, to avoid division by zero."""
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)


def _block_maxima(w_OI: Tensor) -> Tensor:
    rows, columns = w_OI.shape
    padded = torch.nn.functional.pad(w_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.abs().view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).amax((1, 3))


def _expanded(scale: Tensor, w_OI: Tensor, *, blocks: bool) -> Tensor:
    """The scale of each weight, expanded as far as it doesn't broadcast by itself."""
    if not blocks:
        return scale
    rows, columns = w_OI.shape
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
