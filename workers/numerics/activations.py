"""Activations as a quantized layer sees them: rounded, and back in their own dtype.

For verification: what a runtime computes with rounded activations has to be compared with the same. Every function
takes [..., I] with I input features and computes in the dtype it gets, as compressed-tensors 0.20 does; leading
dimensions are tokens, each with a scale of its own unless said otherwise. Zeros stay zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics.fp8 import LARGEST, nonzero, to_e4m3

# 255 / 2, half of the codes' range, as compressed-tensors has it: the largest positive input is clipped to code 127.
HALF_RANGE = 127.5
GROUP = 128


def round_int8_token(x: Tensor) -> Tensor:
    """To 8 bits, symmetric (W8A8)."""
    scale = nonzero(x.abs().amax(-1, keepdim=True) / HALF_RANGE)
    return (x / scale).clamp_(-128, 127).round_() * scale


def round_fp8_token(x: Tensor) -> Tensor:
    """To FP8 E4M3 (``activations: dynamic`` with scales for each tensor or channel)."""
    return round_fp8_static(x, nonzero(x.abs().amax(-1, keepdim=True) / LARGEST))


def round_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """To FP8 E4M3 with the layer's own ``scale`` [1], beyond which the input is clipped."""
    scale = scale.to(x.dtype)
    return to_e4m3(x / scale).to(x.dtype) * scale


def round_fp8_group128(x: Tensor) -> Tensor:
    """To FP8 E4M3, each 128 inputs of a token with a scale of their own (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    Computed in float32, as the kernels do. Where 128 doesn't divide I, the last group is shorter.
    """
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % GROUP)).view(*x.shape[:-1], -1, GROUP)
    return round_fp8_token(groups).flatten(-2)[..., :width].to(x.dtype)
