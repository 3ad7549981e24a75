"""Floats with small groups: MXFP4 and MXFP8 (OCP Microscaling Formats 1.0, sections 5.3 and 6.3), and NVFP4.

O output features, I input features, G groups of input columns, g group size (G * g = I).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.numerics.fp8 import to_e4m3
from workers.numerics.grids import E2M1, E4M3, Nearest
from workers.numerics.pieces import rows_at_a_time

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

    def piece(w_RI: Tensor) -> tuple[Tensor, Tensor]:
        groups_RGg, bits_RG = _exponents(w_RI, E2M1_EXPONENT, E2M1, importance_I)
        return encode(groups_RGg / _power(bits_RG).unsqueeze(-1)).flatten(-2), bits_RG

    return _by_rows(w_OI, piece)


def mxfp8(w_OI: Tensor, importance_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values float8_e4m3fn [O, I] and exponents uint8 [O, I / 32] with a bias of 127, chosen as ``mxfp4`` does."""

    def piece(w_RI: Tensor) -> tuple[Tensor, Tensor]:
        groups_RGg, bits_RG = _exponents(w_RI, E4M3_EXPONENT, E4M3, importance_I)
        return to_e4m3(groups_RGg / _power(bits_RG).unsqueeze(-1)).flatten(-2), bits_RG

    return _by_rows(w_OI, piece)


def nvfp4(
    w_OI: Tensor, global_scale: Tensor | None = None, importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [O, I], scales float8_e4m3fn [O, I / 16] and the global scale float32 [1] that divides them.

    ``global_scale``: one shared with other weights (vLLM fuses q, k, v and gate, up, and needs one for all of them);
    None: this weight's own. A group's scale is the E4M3 number around largest / 6 with the smallest squared error,
    weighed by ``importance_I`` (diag(H)), if it is given.
    """
    divisor = nvfp4_global_scale(w_OI.abs().amax()) if global_scale is None else global_scale.float().reshape(1)

    def piece(w_RI: Tensor) -> tuple[Tensor, Tensor]:
        groups_RGg = w_RI.float().view(len(w_RI), -1, NVFP4_GROUP)
        wanted = (groups_RGg.abs().amax(-1) / LARGEST * divisor).clamp(max=LARGEST_E4M3)
        # The bits of positive E4M3 count upwards from 0, which can't be a divisor, to 126; 127 is NaN.
        start = wanted.to(torch.float8_e4m3fn).view(torch.uint8).int()
        trials = [(start + step).clamp(1, 126) for step in NVFP4_STEPS]

        def scale_of(bits: Tensor) -> Tensor:
            return _e4m3(bits).float() / divisor

        bits_RG = _best(groups_RGg, trials, scale_of, E2M1, importance_I)
        return encode(groups_RGg / scale_of(bits_RG).unsqueeze(-1)).flatten(-2), bits_RG

    codes_OI, bits_OG = _by_rows(w_OI, piece)
    return codes_OI, bits_OG.view(torch.float8_e4m3fn), divisor


def nvfp4_global_scale(abs_max: Tensor) -> Tensor:
    """448 * 6 / ``abs_max``: maps a tensor's largest magnitude to the largest code and scale. Float32 [1]."""
    scale = LARGEST_E4M3 * LARGEST / abs_max.float().reshape(1)
    return torch.where(scale.isfinite(), scale, 1.0)


def encode(x: Tensor) -> Tensor:
    """The nearest codes, uint8, ties to even; clamped to 6. A zero keeps its sign."""
    m = E2M1(x.to(torch.float32, copy=True)).abs_()
    codes = torch.where(m < 2, 2 * m, torch.where(m < 4, m + 2, m / 2 + 4))
    return codes.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


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


def _e4m3(bits: Tensor) -> Tensor:
    return bits.to(torch.uint8).view(torch.float8_e4m3fn)


def _power(bits: Tensor) -> Tensor:
    return torch.exp2(bits.float() - BIAS)


def _exponents(w_RI: Tensor, largest: int, nearest: Nearest, importance_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """Groups [R, G, 32] and their exponents uint8 [R, G], for a type whose largest number is in 2^largest's octave."""
    groups_RGg = w_RI.float().view(len(w_RI), -1, MX_GROUP)
    _, exponent = torch.frexp(groups_RGg.abs().amax(-1))  # the largest is in [2^(exponent - 1), 2^exponent)
    start = torch.where(groups_RGg.any(-1), exponent - 1 - largest + BIAS, 0)
    trials = [(start + step).clamp(0, 254) for step in MX_STEPS]
    return groups_RGg, _best(groups_RGg, trials, _power, nearest, importance_I)


def _by_rows(w_OI: Tensor, piece: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    at_once = rows_at_a_time(w_OI.shape[-1], w_OI.device, ROWS_AT_A_TIME)
    pieces = [piece(w_RI) for w_RI in torch.split(w_OI.contiguous(), at_once)]
    return torch.cat([codes for codes, _ in pieces]), torch.cat([bits for _, bits in pieces])


def _best(
    groups_OGg: Tensor,
    trials_OG: list[Tensor],
    scale_of: Callable[[Tensor], Tensor],
    nearest: Nearest,
    importance_I: Tensor | None,
) -> Tensor:
    """The bits, uint8 [O, G], of each group's trial scale with the least squared error."""
    best = trials_OG[0]
    least = torch.full(best.shape, torch.inf, device=best.device)
    scratch = torch.empty_like(groups_OGg)
    for trial in trials_OG:
        scale = scale_of(trial).unsqueeze(-1)
        torch.div(groups_OGg, scale, out=scratch)
        squares_OGg = nearest(scratch).mul_(scale).sub_(groups_OGg).square_()
        if importance_I is not None:
            squares_OGg.mul_(importance_I.view(groups_OGg.shape[1:]))
        error = squares_OGg.sum(-1)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best.to(torch.uint8)
