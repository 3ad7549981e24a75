"""Integer grids in compressed-tensors' conventions: computes scales and zero points, quantizes and dequantizes.

O output features, I input features, G groups, g group size (G * g = I). Leading batch dimensions are allowed.
Codes are signed: [-2^(bits-1), 2^(bits-1) - 1]; weight = (code - zero) * scale, zero is None for a symmetric grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics.pieces import rows_at_a_time, trials_at_a_time
from workers.numerics.waits import numbers

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
    return params_of(extent(_grouped(w_OI.float(), group_size), symmetric=symmetric), bits, scale_dtype)


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


# What a grid has to cover of each group: its largest magnitude (symmetric), or its lowest and its highest number.
Extent = tuple[Tensor] | tuple[Tensor, Tensor]


def extent(groups: Tensor, *, symmetric: bool) -> Extent:
    """The extents, float [...] each, of groups float [..., g]; on a card in one pass over them."""
    if groups.device.type == "cpu":
        low, high = groups.amin(-1), groups.amax(-1)  # vectorized, as both in one and the norm aren't
        return (torch.maximum(-low, high),) if symmetric else (low, high)
    if symmetric:
        return (torch.linalg.vector_norm(groups, torch.inf, dim=-1),)
    low, high = torch.aminmax(groups, dim=-1)
    return low, high


def shrunken(of: Extent, factor: Tensor) -> Extent:
    """Extents times factors, which broadcast."""
    return (of[0] * factor,) if len(of) == 1 else (of[0] * factor, of[1] * factor)


def params_of(of: Extent, bits: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (int8, None if symmetric) of grids that cover these extents."""
    code_low, code_high = code_range(bits)
    if len(of) == 1:
        return _stored(of[0] / ((code_high - code_low) / 2), scale_dtype), None
    low, high = of[0].clamp(max=0), of[1].clamp(min=0)
    scale = _stored((high - low) / (code_high - code_low), scale_dtype)
    zero = (code_low - low / scale.float()).round().clamp(code_low, code_high)
    return scale, zero.to(torch.int8)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale, which may be overwritten, as it is stored; one that is zero, or rounds to zero, would divide by zero."""
    stored = scale.to(dtype)
    return stored.masked_fill_(stored == 0, torch.finfo(dtype).eps)


def _search(
    groups_OGg: Tensor, weights_OGg: Tensor | None, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    whole = extent(groups_OGg, symmetric=symmetric)

    def params(factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return params_of(shrunken(whole, factor), bits, scale_dtype)

    def errors_of(factor_TOG: Tensor) -> Tensor:
        return _errors(groups_OGg, weights_OGg, *params(factor_TOG), bits)

    factor_T = numbers((*COARSE, *SMALLER), groups_OGg.device)
    coarse_T, smaller_T = factor_T[: len(COARSE)], factor_T[len(COARSE) :]
    errors_TOG = errors_of(coarse_T[:, None, None])
    first_1OG = first_least(errors_TOG)
    best, least = coarse_T[first_1OG[0]], errors_TOG.gather(0, first_1OG)[0]
    # Few rows have such groups at 4 bits: they are searched on alone. A card is waited for once, for their number.
    rows = (best == COARSE[-1]).any(-1).nonzero().flatten()
    if len(rows):
        some_RGg, weights_RGg = groups_OGg[rows], None if weights_OGg is None else weights_OGg[rows]
        factor_TRG = smaller_T[:, None, None].expand(-1, *best[rows].shape)
        params_TRG = params_of(shrunken(extent(some_RGg, symmetric=symmetric), factor_TRG), bits, scale_dtype)
        errors_TRG = _errors(some_RGg, weights_RGg, *params_TRG, bits)
        best[rows], least[rows] = _as_long_as_better(best[rows], least[rows], factor_TRG, errors_TRG)
    for step in FINE_STEPS:
        around_TOG = torch.stack((best - step, best + step))
        for trial, error in zip(around_TOG, errors_of(around_TOG), strict=True):
            best, least = _keep_better(best, least, trial, error)
    return params(best)


def _as_long_as_better(best: Tensor, least: Tensor, factor_T: Tensor, error_T: Tensor) -> tuple[Tensor, Tensor]:
    """Groups whose best is the coarse grid's last go on to the next factor as long as its error is smaller."""
    factors, errors = torch.cat([best[None], factor_T]), torch.cat([least[None], error_T])
    better_T = (errors[1:] < errors[:-1]) & (best == COARSE[-1])
    last = better_T.cumprod(0).sum(0, keepdim=True)
    return factors.gather(0, last)[0], errors.gather(0, last)[0]


def rounding_noise(
    groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int, *, out: Tensor | None = None
) -> Tensor:
    """What rounding adds to groups, float32: decoded less given. Scales and zero points broadcast: of trials, too."""
    low, high = code_range(bits)
    codes = torch.div(groups, scale, out=out)
    if zero is None:
        codes.round_().clamp_(low, high)
    else:
        codes.add_(zero).round_().clamp_(low, high).sub_(zero)
    return codes.mul_(scale).sub_(groups)


def first_least(error_T: Tensor) -> Tensor:
    """The number of the first trial with the least error, int64 [1, ...]; NaN is never the least."""
    return error_T.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)


def _keep_better(best: Tensor, least: Tensor, trial: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    better = error < least
    return torch.where(better, trial, best), torch.where(better, error, least)


def _errors(
    groups_OGg: Tensor,
    weights_OGg: Tensor | None,
    scale_TOG: Tensor,
    zero_TOG: Tensor | None,
    bits: int,
) -> Tensor:
    """The squared error of each of T trials, [T, O, G]."""
    scale_TOG1 = scale_TOG.float().unsqueeze(-1)
    zero_TOG1 = None if zero_TOG is None else zero_TOG.float().unsqueeze(-1)
    errors_TOG = torch.empty(scale_TOG.shape, device=scale_TOG.device)
    at_once = trials_at_a_time(groups_OGg.numel(), groups_OGg.device)
    scratch = groups_OGg.new_empty(min(at_once, len(scale_TOG)), *groups_OGg.shape)
    for start in range(0, len(scale_TOG), at_once):
        now = slice(start, start + at_once)
        scale, error = scale_TOG1[now], errors_TOG[now]
        zero = None if zero_TOG1 is None else zero_TOG1[now]
        noise = rounding_noise(groups_OGg, scale, zero, bits, out=scratch[: len(scale)])
        if weights_OGg is None:
            torch.linalg.vector_norm(noise, dim=-1, out=error)
        else:
            torch.sum(noise.square_().mul_(weights_OGg), -1, out=error)
    return errors_TOG.square_() if weights_OGg is None else errors_TOG
