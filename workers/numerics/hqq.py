"""Half-quadratic quantization (Badri and Shaji, 2023): grids that minimize an l_p norm of the weights' error.

With p below 1, the few outliers of a group may err in favour of the many others. Half-quadratic splitting minimizes the
norm: shrinking separates the outliers' part of the error, then least squares fits the grid to the rest. The paper
fits only the zero point; here the scale is fitted too, because our zero points are integers.

O output features, I input features, g group size, N groups of all rows. Codes and zero points are ``rounding``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.numerics import rounding
from workers.numerics.pieces import rows_at_a_time

# The weight of the quadratic term, and its growth factor per iteration.
BETA, GROWTH = 10.0, 1.01
LEAST_ERROR = 1e-8  # below it |e|^(p - 1) would overflow
PIECE_ELEMENTS = 1 << 18  # keeps the temporaries in the cache


def params(
    w_OI: Tensor, bits: int, group_size: int | None, *, scale_dtype: torch.dtype, iterations: int, norm: float
) -> tuple[Tensor, Tensor]:
    """Scale [..., O, G] in ``scale_dtype`` and zero point (int8) of each group, from its range by ``iterations`` steps.

    ``norm`` is p in (0, 2). The step with the smallest sum of |error|^p wins: never worse than the min-max range.
    """
    size = group_size or w_OI.shape[-1]
    groups_Ng = w_OI.reshape(-1, size)
    scales, zeros = [], []
    at_once = rows_at_a_time(size, w_OI.device, max(PIECE_ELEMENTS // size, 1))
    for piece_Ng in torch.split(groups_Ng, at_once):
        scale_N, zero_N = _fit(piece_Ng.float(), bits, scale_dtype, iterations, norm)
        scales.append(scale_N)
        zeros.append(zero_N)
    shape = (*w_OI.shape[:-1], w_OI.shape[-1] // size)
    return torch.cat(scales).view(shape), torch.cat(zeros).view(shape)


def _fit(w_Ng: Tensor, bits: int, dtype: torch.dtype, iterations: int, norm: float) -> tuple[Tensor, Tensor]:
    scale_N, zero_N = rounding.params_of(rounding.extent(w_Ng, symmetric=False), bits, dtype)
    assert zero_N is not None
    beta, best_scale_N, best_zero_N = BETA, scale_N, zero_N
    codes_Ng = rounding.quantize_groups(w_Ng, scale_N, zero_N, bits).float()
    least_N = _error(w_Ng, codes_Ng, scale_N, zero_N, norm)
    for _ in range(iterations):
        step_N1 = scale_N.float().unsqueeze(-1)
        noise_Ng = w_Ng / step_N1 - (codes_Ng - zero_N.unsqueeze(-1))
        wanted_Ng = w_Ng / step_N1 - _shrunk(noise_Ng, beta, norm)
        scale_N, zero_N = _refitted(wanted_Ng, codes_Ng, scale_N, bits)
        codes_Ng = rounding.quantize_groups(w_Ng, scale_N, zero_N, bits).float()
        error_N = _error(w_Ng, codes_Ng, scale_N, zero_N, norm)
        better_N = error_N < least_N
        best_scale_N = torch.where(better_N, scale_N, best_scale_N)
        best_zero_N = torch.where(better_N, zero_N, best_zero_N)
        least_N = torch.minimum(error_N, least_N)
        beta *= GROWTH
    return best_scale_N, best_zero_N


def _shrunk(noise: Tensor, beta: float, norm: float) -> Tensor:
    """Generalized soft thresholding: the part of the error that is attributed to outliers."""
    magnitude = noise.abs()
    return noise.sign() * (magnitude - magnitude.clamp(min=LEAST_ERROR).pow(norm - 1) / beta).clamp(min=0)


def _refitted(wanted_Ng: Tensor, codes_Ng: Tensor, scale_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point that fit the codes to the wanted weights, by least squares."""
    low, high = rounding.code_range(bits)
    code_mean_N1, wanted_mean_N1 = codes_Ng.mean(-1, keepdim=True), wanted_Ng.mean(-1, keepdim=True)
    code_rest_Ng = codes_Ng - code_mean_N1
    spread_N = code_rest_Ng.square().sum(-1)
    slope_N = (code_rest_Ng * (wanted_Ng - wanted_mean_N1)).sum(-1) / spread_N.clamp(min=1e-6)
    # A group with a single code, or whose codes run against the weights, keeps its scale.
    slope_N = torch.where(slope_N > 1e-3, slope_N, 1.0)
    zero_N = (code_mean_N1[:, 0] - wanted_mean_N1[:, 0] / slope_N).round().clamp(low, high)
    steps_Ng = codes_Ng - zero_N.unsqueeze(-1)
    # Rounding the zero point changes the best scale.
    factor_N = (steps_Ng * wanted_Ng).sum(-1) / steps_Ng.square().sum(-1).clamp(min=1e-6)
    factor_N = torch.where(factor_N > 1e-3, factor_N, 1.0)
    refitted_N = (scale_N.float() * factor_N).to(scale_N.dtype)
    usable_N = refitted_N.isfinite() & (refitted_N > 0)
    return torch.where(usable_N, refitted_N, scale_N), zero_N.to(torch.int8)


def _error(w_Ng: Tensor, codes_Ng: Tensor, scale_N: Tensor, zero_N: Tensor, norm: float) -> Tensor:
    return (rounding.dequantize_groups(codes_Ng, scale_N, zero_N) - w_Ng).abs().pow(norm).sum(-1)
