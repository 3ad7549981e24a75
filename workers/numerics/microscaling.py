"""Floats with small groups: MXFP4 and MXFP8 (OCP Microscaling Formats 1.0, sections 5.3 and 6.3), and NVFP4.

O output features, I input features, G groups of input columns, g group size (G * g = I).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workers.numerics.fp8 import to_e4m3
from workers.numerics.grids import E2M1, E4M3, Floats
from workers.numerics.pieces import rows_at_a_time, trials_at_a_time
from workers.numerics.rounding import first_least
from workers.numerics.waits import numbers

# Values of the codes 0 to 7; 8 to 15 are the same with a minus sign.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = VALUES[-1]
LARGEST_E4M3 = 448.0
MX_GROUP, NVFP4_GROUP = 32, 16
E2M1_EXPONENT, E4M3_EXPONENT = 2, 8  # of the largest number's power of two
BIAS = 127
ROWS_AT_A_TIME = 64  # keeps the search's temporaries in the cache
# Scales tried, as steps from the initial scale; the first wins ties. Larger sets found nothing better.
MX_STEPS = (0, 1)
NVFP4_STEPS = (0, -2, -1, 1, 2, 3, 4, 5, 6)


def mxfp4(w_OI: Tensor, importance_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I] and exponents uint8 [O, I / 32] with a bias of 127.

    ``importance_I`` weighs the squared errors of the columns when scales are chosen (diag(H)); None: all alike.

    A group's exponent is the standard's, floor(log2(largest)) - 2, which may clip the largest weight, or the next one,
    which never clips: whichever has the smaller squared error. A group of zeros has the exponent 0.
    """

    bits_OG = mx_exponents(w_OI, importance_I, E2M1)
    return nearest4(w_OI, bits_OG), bits_OG


def mxfp8(w_OI: Tensor, importance_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values float8_e4m3fn [O, I] and exponents uint8 [O, I / 32] with a bias of 127, chosen as ``mxfp4`` does."""

    bits_OG = mx_exponents(w_OI, importance_I, E4M3)
    return nearest8(w_OI, bits_OG), bits_OG


def mx_exponents(w_OI: Tensor, importance_I: Tensor | None, grid: Floats) -> Tensor:
    """The exponents of ``mxfp4`` (``grid`` E2M1) or ``mxfp8`` (E4M3), uint8 [O, I / 32]."""
    largest = math.frexp(grid.largest)[1] - 1

    def piece(w_RI: Tensor) -> Tensor:
        groups_RGg = w_RI.float().view(len(w_RI), -1, MX_GROUP)
        _, exponent = torch.frexp(groups_RGg.abs().amax(-1))  # the largest is in [2^(exponent - 1), 2^exponent)
        start = (exponent + (BIAS - 1 - largest)) * groups_RGg.any(-1)
        trials_TRG = (start + _steps(MX_STEPS, start.device)).clamp_(0, 254)
        return _best(groups_RGg, trials_TRG, _power(trials_TRG), grid, importance_I)

    return _by_rows(piece, w_OI)


def nvfp4(
    w_OI: Tensor, global_scale: Tensor | None = None, importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [O, I], scales float8_e4m3fn [O, I / 16] and the global scale float32 [1] that divides them.

    ``global_scale``: one shared with other weights (vLLM fuses q, k, v and gate, up, and needs one for all of them);
    None: this weight's own. A group's scale is the E4M3 number around largest / 6 with the smallest squared error,
    weighed by ``importance_I`` (diag(H)), if it is given.
    """
    divisor = nvfp4_global_scale(w_OI.abs().amax()) if global_scale is None else global_scale.float().reshape(1)
    divisor_O1 = divisor.expand(len(w_OI), 1)
    scale_OG = nvfp4_scales(w_OI, divisor_O1, importance_I)
    return nearest4(w_OI, scale_OG, divisor_O1), scale_OG, divisor


def nvfp4_scales(w_OI: Tensor, divisor_O1: Tensor, importance_I: Tensor | None) -> Tensor:
    """The scales of ``nvfp4``, float8_e4m3fn [O, I / 16], where ``divisor_O1`` is each row's global scale."""

    def piece(w_RI: Tensor, divisor_R1: Tensor) -> Tensor:
        groups_RGg = w_RI.float().view(len(w_RI), -1, NVFP4_GROUP)
        wanted = (groups_RGg.abs().amax(-1) / LARGEST * divisor_R1).clamp(max=LARGEST_E4M3)
        # The bits of positive E4M3 count upwards from 0, which can't be a divisor, to 126; 127 is NaN.
        start = wanted.to(torch.float8_e4m3fn).view(torch.uint8).int()
        trials_TRG = (start + _steps(NVFP4_STEPS, start.device)).clamp_(1, 126)
        scales_TRG = trials_TRG.to(torch.uint8).view(torch.float8_e4m3fn).float() / divisor_R1
        return _best(groups_RGg, trials_TRG, scales_TRG, E2M1, importance_I)

    return _by_rows(piece, w_OI, divisor_O1).view(torch.float8_e4m3fn)


def nearest4(w_OI: Tensor, scale_OG: Tensor, divisor_O1: Tensor | None = None) -> Tensor:
    """The nearest E2M1 codes, uint8 [O, I], for scales as they are stored; ``divisor_O1`` as in ``nvfp4_scales``."""
    return _by_rows(
        lambda w_RI, scale_RG: encode(_divided(w_RI, scale_RG)), w_OI, effective_scales(scale_OG, divisor_O1)
    )


def nearest8(w_OI: Tensor, scale_OG: Tensor, divisor_O1: Tensor | None = None) -> Tensor:
    """The nearest E4M3 numbers, float8_e4m3fn [O, I], as ``nearest4``."""
    scales = effective_scales(scale_OG, divisor_O1)
    return _by_rows(lambda w_RI, scale_RG: to_e4m3(_divided(w_RI, scale_RG)), w_OI, scales)


def nvfp4_global_scale(abs_max: Tensor) -> Tensor:
    """448 * 6 / ``abs_max``: maps a tensor's largest magnitude to the largest code and scale. Float32 [1]."""
    scale = LARGEST_E4M3 * LARGEST / abs_max.float().reshape(1)
    return scale.masked_fill_(scale == torch.inf, 1.0)


def encode(x: Tensor) -> Tensor:
    """The nearest codes, uint8, ties to even; clamped to 6. A zero keeps its sign."""
    return codes_of(E2M1.magnitudes(x.float().abs()), x)


def codes_of(values: Tensor, signs: Tensor | None = None) -> Tensor:
    """The codes, uint8, of numbers of the grid, which have the signs of ``signs``, if it is given."""
    codes = torch.bucketize(values.abs(), numbers(VALUES, values.device), out_int32=True).to(torch.uint8)
    return codes.add_(torch.signbit(values if signs is None else signs).view(torch.uint8), alpha=8)


def effective_scales(scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:
    """What codes are multiplied with, float32 [O, G]; see ``codes.Float4Weight``."""
    return _power(scale_OG) if global_scale is None else scale_OG.float() / global_scale


def dequantize(codes_OI: Tensor, scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:
    """The decoded weights, float32 [O, I]; see ``codes.Float4Weight``."""
    values = torch.tensor(VALUES + tuple(-value for value in VALUES), device=codes_OI.device)
    scale = effective_scales(scale_OG, global_scale)
    groups_OGg = values[codes_OI.long()].view(*scale.shape, -1)
    return (groups_OGg * scale.unsqueeze(-1)).flatten(-2)


def dequantize_mxfp8(values_OI: Tensor, exponent_OG: Tensor) -> Tensor:
    """The decoded weights, float32 [O, I]; see ``codes.Mxfp8Weight``."""
    groups_OGg = values_OI.float().view(*exponent_OG.shape, -1)
    return (groups_OGg * _power(exponent_OG).unsqueeze(-1)).flatten(-2)


def pack(codes_OI: Tensor) -> Tensor:
    """Pack two codes per byte, the first in the low half: uint8 [O, I / 2]."""
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << 4)


def unpack(pairs: Tensor) -> Tensor:
    """Inverse of ``pack``: uint8 [O, I]."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def _steps(steps: tuple[int, ...], device: torch.device) -> Tensor:
    return numbers(steps, device).int()[:, None, None]


def _power(bits: Tensor) -> Tensor:
    return torch.exp2(bits.float() - BIAS)


def _divided(w_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Weights over their groups' scales, float32 [O, I]."""
    return (torch.unflatten(w_OI.float(), -1, (scale_OG.shape[-1], -1)) / scale_OG.unsqueeze(-1)).flatten(-2)


def _by_rows(piece: Callable[..., Tensor], w_OI: Tensor, *others: Tensor) -> Tensor:
    """What ``piece`` makes of rows of tensors, as many at a time as a piece of the first holds."""
    at_once = rows_at_a_time(w_OI.shape[-1], w_OI.device, ROWS_AT_A_TIME)
    parts = [torch.split(tensor, at_once) for tensor in (w_OI.contiguous(), *others)]
    return torch.cat([piece(*rows) for rows in zip(*parts, strict=True)])


def _best(
    groups_OGg: Tensor, trials_TOG: Tensor, scales_TOG: Tensor, grid: Floats, importance_I: Tensor | None
) -> Tensor:
    """The bits, uint8 [O, G], of each group's trial scale with the least squared error."""
    magnitudes_OGg = groups_OGg.abs()  # a grid is the same on both sides of zero
    at_once = trials_at_a_time(groups_OGg.numel(), groups_OGg.device)
    errors_TOG = torch.empty(scales_TOG.shape, device=groups_OGg.device)
    scratch = groups_OGg.new_empty(min(at_once, len(scales_TOG)), *groups_OGg.shape)
    for scale_tOG, error_tOG in zip(torch.split(scales_TOG, at_once), torch.split(errors_TOG, at_once), strict=True):
        scale = scale_tOG.unsqueeze(-1)
        steps = torch.div(magnitudes_OGg, scale, out=scratch[: len(scale)])
        squares = grid.magnitudes(steps).mul_(scale).sub_(magnitudes_OGg).square_()
        if importance_I is not None:
            squares.mul_(importance_I.view(groups_OGg.shape[1:]))
        torch.sum(squares, -1, out=error_tOG)
    return trials_TOG.gather(0, first_least(errors_TOG))[0].to(torch.uint8)
