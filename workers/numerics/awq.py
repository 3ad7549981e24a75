"""AWQ (arXiv 2306.00978): scales of the inputs and clipped ranges that minimize the loss of rounding to nearest.

The paper measures an output's error by forwards; here it is computed from H = X^T X alone: tr(E H E^T), the same sum.
B stacked problems, O output features, I input features, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.numerics import rounding

# Scales outside of this range would cost a half-precision norm or weight its digits.
LEAST, MOST = 1e-4, 1e4
# Shares of a group's range tried by the clipping search.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
Problem = tuple[Tensor, Tensor]


def weight_means(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """Each input's weight magnitudes relative to the largest of their group, averaged over all rows: float32 [I]."""
    total, rows = torch.zeros(weights[0].shape[-1], device=weights[0].device), 0
    for w_BOI in weights:
        size = group_size or w_BOI.shape[-1]
        magnitudes = torch.unflatten(w_BOI.float().abs(), -1, (-1, size))
        share = magnitudes / magnitudes.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total += share.flatten(-2).flatten(0, -2).sum(0)
        rows += w_BOI[..., 0].numel()
    return total / rows


def input_scales(
    problems: Sequence[Problem],
    input_mean_I: Tensor,
    weight_mean_I: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    grid: int,
) -> Tensor:
    """The scales s (float32 [I], positive, finite) that minimize the loss of ``Q(W s) / s``; 1 if nothing is better.

    ``problems``: weights float [B, O, I] and H float32 [B, I, I] of all consumers of this input. Candidates are x^a and
    x^a / w^(1 - a), with the mean magnitudes ``input_mean_I`` (x) and ``weight_means`` (w), for exponents a that are
    multiples of 1 / ``grid`` up to 1: first four of them, then those around the best in decreasing steps.
    """
    x_I, w_I = input_mean_I.float(), weight_mean_I.float().clamp(min=LEAST)

    def loss_of(scale_I: Tensor) -> float:
        return _loss(problems, scale_I, bits, group_size, symmetric)

    ones_I = torch.ones_like(x_I)
    candidates = [
        (loss_of(ones_I), ones_I),
        _searched(lambda a: _bounded(x_I.pow(a)), loss_of, grid),
        _searched(lambda a: _bounded(x_I.pow(a) / w_I.pow(1 - a)), loss_of, grid),
    ]
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _searched(
    scale_of: Callable[[float], Tensor], loss_of: Callable[[Tensor], float], grid: int
) -> tuple[float, Tensor]:
    """The minimum loss over multiples of 1 / ``grid`` in (0, 1], and its scales."""
    tried: dict[int, tuple[float, Tensor]] = {}

    def loss_at(step: int) -> float:
        if step not in tried:
            scale_I = scale_of(step / grid)
            tried[step] = (loss_of(scale_I), scale_I)
        return tried[step][0]

    stride = max(grid // 4, 1)
    best = min(range(stride, grid + 1, stride), key=loss_at)
    while stride > 1:
        stride = (stride + 1) // 2
        best = min((best, max(best - stride, 1), min(best + stride, grid)), key=loss_at)
    return tried[best]


def _bounded(scale_I: Tensor) -> Tensor:
    """Center the scales' range around 1, and clamp it; an input that was always zero keeps scale 1."""
    seen_I = (scale_I > 0) & scale_I.isfinite()
    if not bool(seen_I.any()):
        return torch.ones_like(scale_I)
    seen = scale_I[seen_I]
    return torch.where(seen_I, scale_I / (seen.amax() * seen.amin()).sqrt(), 1.0).clamp(LEAST, MOST)


def _loss(problems: Sequence[Problem], scale_I: Tensor, bits: int, group_size: int | None, symmetric: bool) -> float:
    total = 0.0
    for w_BOI, h_BII in problems:
        scaled_BOI = w_BOI.float() * scale_I
        scale, zero = rounding.minmax_params(scaled_BOI, bits, group_size, symmetric=symmetric)
        codes = rounding.quantize(scaled_BOI, scale, zero, bits)
        error_BOI = (rounding.dequantize(codes, scale, zero) - scaled_BOI) / scale_I
        total += float(((error_BOI @ h_BII) * error_BOI).sum(dtype=torch.float64))
    return total


def clipped_params(
    w_BOI: Tensor,
    h_BII: Tensor,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Scale [B, O, G] and zero point (int8, None if symmetric) of each group's range, clipped to minimize the loss.

    The loss is e H e^T over the columns of the group alone; ``h_BII`` float32.
    """
    width = w_BOI.shape[-1]
    size = group_size or width
    blocks_BGgg = torch.stack([h_BII[:, i : i + size, i : i + size] for i in range(0, width, size)], 1)
    groups_BGOg = torch.unflatten(w_BOI.float(), -1, (-1, size)).transpose(1, 2)
    low, high = groups_BGOg.amin(-1), groups_BGOg.amax(-1)
    best_BGO, least_BGO = torch.ones_like(low), torch.full_like(low, torch.inf)
    for clip in CLIPS:
        scale, zero = rounding.range_params(low * clip, high * clip, bits, symmetric=symmetric, scale_dtype=scale_dtype)
        codes = rounding.quantize_groups(groups_BGOg, scale, zero, bits)
        error_BGOg = rounding.dequantize_groups(codes, scale, zero) - groups_BGOg
        loss_BGO = ((error_BGOg @ blocks_BGgg) * error_BGOg).sum(-1)
        best_BGO = torch.where(loss_BGO < least_BGO, clip, best_BGO)
        least_BGO = torch.minimum(least_BGO, loss_BGO)
    scale, zero = rounding.range_params(
        low * best_BGO, high * best_BGO, bits, symmetric=symmetric, scale_dtype=scale_dtype
    )
    return scale.transpose(1, 2), None if zero is None else zero.transpose(1, 2)
