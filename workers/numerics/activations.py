"""Rounds activations as a quantized layer does, and returns them in their original dtype.

For verification: our decoder must be compared with a runtime under the same rounding. Every function takes [..., I]
with I input features and computes in the input's dtype, as compressed-tensors 0.20 does; leading dimensions are tokens,
each with its own scale unless noted. Zeros stay zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics.fp8 import LARGEST, nonzero, to_e4m3

# 255 / 2, half of the code range, as in compressed-tensors: the largest positive input is clipped to code 127.
HALF_RANGE = 127.5
GROUP = 128


def round_int8_token(x: Tensor) -> Tensor:
    """Round to 8-bit integers, symmetric (W8A8)."""
    scale = nonzero(x.abs().amax(-1, keepdim=True) / HALF_RANGE)
    return (x / scale).clamp_(-128, 127).round_() * scale


def round_fp8_token(x: Tensor) -> Tensor:
    """Round to FP8 E4M3 (``activations: dynamic`` with scales for each tensor or channel)."""
    return round_fp8_static(x, nonzero(x.abs().amax(-1, keepdim=True) / LARGEST))


def round_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """Round to FP8 E4M3 with the layer's static ``scale`` [1]; larger inputs are clipped."""
    scale = scale.to(x.dtype)
    return to_e4m3(x / scale).to(x.dtype) * scale


def round_fp8_group128(x: Tensor) -> Tensor:
    """Round to FP8 E4M3 with one scale per 128 inputs of a token (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    Computed in float32, as in the kernels. If 128 doesn't divide I, the last group is shorter.
    """
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % GROUP)).view(*x.shape[:-1], -1, GROUP)
    return round_fp8_token(groups).flatten(-2)[..., :width].to(x.dtype)
