"""Rounds activations as a quantized layer does, and returns them in their original dtype.

For verification: our decoder must be compared with a runtime under the same rounding. Every function takes [..., I]
with I input features and computes in the input's dtype, as compressed-tensors 0.20 does; leading dimensions are tokens,
each with its own scale unless noted. Zeros stay zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics import microscaling
from workers.numerics.fp8 import LARGEST, nonzero, to_e4m3
from workers.numerics.grids import E2M1, E4M3, Nearest

# 255 / 2, half of the code range, as in compressed-tensors: the largest positive input is clipped to code 127.
HALF_RANGE = 127.5
GROUP = 128
ROUNDED_UP = 1.75  # from here on a magnitude counts to the next power of two (compressed-tensors 0.20)


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


def round_mxfp4(x: Tensor) -> Tensor:
    """Round to MXFP4: E2M1, a power of two for each 32 inputs of a token."""
    return _round_mx(x, microscaling.E2M1_EXPONENT, E2M1)


def round_mxfp8(x: Tensor) -> Tensor:
    """Round to MXFP8: E4M3, a power of two for each 32 inputs of a token."""
    return _round_mx(x, microscaling.E4M3_EXPONENT, E4M3)


def round_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """Round to NVFP4: E2M1, an E4M3 scale for each 16 inputs of a token, divided by the ``global_scale`` [1]."""
    groups = x.reshape(*x.shape[:-1], -1, microscaling.NVFP4_GROUP)
    wanted = global_scale * (groups.abs().amax(-1, keepdim=True) / microscaling.LARGEST)
    scale = to_e4m3(wanted).float()
    # Zeros take E4M3's epsilon.
    scale = torch.where(scale == 0, torch.finfo(torch.float8_e4m3fn).eps, scale) / global_scale
    return (E2M1(groups / scale) * scale).flatten(-2).to(x.dtype)


def _round_mx(x: Tensor, largest: int, nearest: Nearest) -> Tensor:
    """Round groups of 32 to ``nearest`` numbers of a type whose largest number is in the octave of 2^``largest``.

    A group's exponent is its largest magnitude's, or the next one if that is at least 1.75 times the power of two.
    """
    groups = x.reshape(*x.shape[:-1], -1, microscaling.MX_GROUP).float()
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))  # mantissa in [0.5, 1)
    exponent = exponent - 1 - largest + (mantissa >= ROUNDED_UP / 2).int()
    scale = torch.exp2(exponent.clamp(min=-microscaling.BIAS).float())
    return (nearest(groups / scale) * scale).flatten(-2).to(x.dtype)
