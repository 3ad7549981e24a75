"""Integer grids in compressed-tensors' conventions: computes scales and zero points, quantizes and dequantizes.

O output features, I input features, G groups, g group size (G * g = I). Leading batch dimensions are allowed.
Codes are signed: [-2^(bits-1), 2^(bits-1) - 1]; weight = (code - zero) * scale, zero is None for a symmetric grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.numerics.pieces import rows_at_a_time

# Factors on the min-max range tried by the MSE search: a coarse grid; then smaller ones for groups whose best was the
# smallest (2 or 3 bits for a long row with outliers: the best is 0.1 to 0.4); then halving steps around the best.
COARSE = (1.0, 0.9, 0.8, 0.7, 0.56)
SMALLER = (0.46, 0.37, 0.3, 0.24, 0.19, 0.15, 0.12)
FINE_STEPS = (0.05, 0.025)
ROWS_AT_A_TIME = 256  # keeps the search's temporaries in the cache


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_params(
    w_OI: Tensor, bits: int, group_size: int | None, *, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale [..., O, G] in ``scale_dtype`` and zero point (int8, None if symmetric) that cover each group's range.

    ``group_size`` None: one group for each row. A group of zeros gets a scale that keeps it exactly zero.
    """
    groups = _grouped(w_OI.float(), group_size)
    return range_params(groups.amin(-1), groups.amax(-1), bits, symmetric=symmetric, scale_dtype=scale_dtype)


def mse_params(
    w_OI: Tensor,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
    importance_I: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Like ``minmax_params``, for the shrunken range that minimizes each group's squared rounding error.

    ``importance_I`` (float [..., I], nonnegative) weights the columns' errors; None: all equal.
    """
    *batch, rows, _ = w_OI.shape
    flat = w_OI.reshape(-1, w_OI.shape[-1])
    weights = None
    if importance_I is not None:
        weights = importance_I.float().unsqueeze(-2).expand(w_OI.shape).reshape(flat.shape)
    scales, zeros = [], []
    at_once = rows_at_a_time(flat.shape[1:].numel(), flat.device, ROWS_AT_A_TIME)
    for start in range(0, len(flat), at_once):
        piece = slice(start, start + at_once)
        weight = None if weights is None else _grouped(weights[piece], group_size)
        scale, zero = _search(_grouped(flat[piece].float(), group_size), weight, bits, symmetric, scale_dtype)
        scales.append(scale)
        zeros.append(zero)
    scale_OG = torch.cat(scales).view(*batch, rows, -1)
    return scale_OG, None if symmetric else torch.cat([z for z in zeros if z is not None]).view(scale_OG.shape)


def quantize(w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, int8 [..., O, I]."""
    groups = _grouped(w_OI.float(), w_OI.shape[-1] // scale_OG.shape[-1])
    return quantize_groups(groups, scale_OG, zero_OG, bits).flatten(-2)


def quantize_groups(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, int8 [..., g], of groups float32 [..., g] with scales and zero points [...]."""
    low, high = code_range(bits)
    steps = groups / scale.float().unsqueeze(-1)
    if zero is not None:
        steps = steps + zero.unsqueeze(-1)
    return steps.round_().clamp_(low, high).to(torch.int8)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
    """The decoded weights, float32 [..., O, I]."""
    groups = _grouped(codes_OI, codes_OI.shape[-1] // scale_OG.shape[-1])
    return dequantize_groups(groups, scale_OG, zero_OG).flatten(-2)


def dequantize_groups(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The decoded weights of groups of codes [..., g], float32."""
    steps = codes.float()
    if zero is not None:
        steps = steps - zero.unsqueeze(-1)
    return steps * scale.float().unsqueeze(-1)


def biases(scale_OG: Tensor, zero_OG: Tensor | None, bits: int) -> Tensor:
    """The bias of each group for unsigned codes, ``weight = unsigned * scale + bias``, in the dtype of the scales.

    Exact for a symmetric grid: a power of two times the scale.
    """
    offset = float(1 << (bits - 1))
    zero = offset if zero_OG is None else zero_OG.float() + offset
    return (scale_OG.float() * -zero).to(scale_OG.dtype)


def stored_zero(scale_OG: Tensor, zero_OG: Tensor, bits: int) -> Tensor:
    """The zero point that a bias in the dtype of the scales stands for: what storing makes of ``zero_OG``, float32."""
    bias_OG = biases(scale_OG, zero_OG, bits).float()
    return -bias_OG / scale_OG.float() - float(1 << (bits - 1))


def dequantize_biased(codes_OI: Tensor, scale_OG: Tensor, bias_OG: Tensor) -> Tensor:
    """The decoded weights, float32 [O, I], of unsigned codes with a scale and a bias for each group."""
    groups = _grouped(codes_OI.float(), codes_OI.shape[-1] // scale_OG.shape[-1])
    return (groups * scale_OG.float().unsqueeze(-1) + bias_OG.float().unsqueeze(-1)).flatten(-2)


def _grouped(w_OI: Tensor, group_size: int | None) -> Tensor:
    width = w_OI.shape[-1]
    size = group_size or width
    assert width % size == 0, f"{size} doesn't divide {width}: the caller refuses that"
    return w_OI.reshape(*w_OI.shape[:-1], width // size, size)


def range_params(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (int8, None if symmetric) of grids over the ranges from ``low`` to ``high``, float [...]."""
    code_low, code_high = code_range(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / (code_high - code_low)).to(scale_dtype)
    # A scale that is zero, or rounds to zero in the stored dtype, would divide by zero.
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale).to(scale_dtype)
    if symmetric:
        return scale, None
    zero = (code_low - low / scale.float()).round().clamp(code_low, code_high)
    return scale, zero.to(torch.int8)


def _search(
    groups_OGg: Tensor, weights_OGg: Tensor | None, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    low, high = groups_OGg.amin(-1), groups_OGg.amax(-1)
    scratch = torch.empty_like(groups_OGg)

    def error_of(factor: Tensor | float) -> Tensor:
        scale, zero = range_params(low * factor, high * factor, bits, symmetric=symmetric, scale_dtype=scale_dtype)
        return _error(groups_OGg, weights_OGg, scale, zero, bits, scratch)

    best = torch.full_like(low, COARSE[0])
    least = error_of(best)
    for candidate in COARSE[1:]:
        best, least = _keep_better(best, least, torch.full_like(low, candidate), error_of(candidate))
    for last, candidate in zip((COARSE[-1], *SMALLER), SMALLER, strict=False):
        falling = best == last
        if not bool(falling.any()):
            break
        # Other groups keep their factor, so that no group's scale depends on the other groups of its piece.
        trial = torch.where(falling, candidate, best)
        best, least = _keep_better(best, least, trial, error_of(trial))
    for step in FINE_STEPS:
        around: Sequence[Tensor] = (best - step, best + step)
        for trial in around:
            best, least = _keep_better(best, least, trial, error_of(trial))
    return range_params(low * best, high * best, bits, symmetric=symmetric, scale_dtype=scale_dtype)


def _keep_better(best: Tensor, least: Tensor, trial: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    better = error < least
    return torch.where(better, trial, best), torch.where(better, error, least)


def _error(
    groups_OGg: Tensor,
    weights_OGg: Tensor | None,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    bits: int,
    scratch_OGg: Tensor,
) -> Tensor:
    code_low, code_high = code_range(bits)
    scale = scale_OG.float().unsqueeze(-1)
    codes = torch.div(groups_OGg, scale, out=scratch_OGg)
    if zero_OG is None:
        codes.round_().clamp_(code_low, code_high)
    else:
        zero = zero_OG.float().unsqueeze(-1)
        codes.add_(zero).round_().clamp_(code_low, code_high).sub_(zero)
    noise = codes.mul_(scale).sub_(groups_OGg)
    if weights_OGg is None:
        norm: Tensor = torch.linalg.vector_norm(noise, dim=-1)
        return norm.square_()
    return noise.square_().mul_(weights_OGg).sum(-1)
