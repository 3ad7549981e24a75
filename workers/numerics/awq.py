"""AWQ (arXiv 2306.00978): scales of the inputs and clipped ranges that make rounding to nearest lose least.

The paper measures an output's error by forwards; here it is tr(E H E^T), the same sum, from H = X^T X alone.
B stacked problems, O output features, I input features, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workers.numerics import rounding

# Scales beyond these would cost a half-precision norm or weight its digits.
LEAST, MOST = 1e-4, 1e4
# Shares of a group's range that the clipping search tries.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
Problem = tuple[Tensor, Tensor]


def weight_means(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """How large each input's weights are beside the largest of their group, in the mean over all rows: float32 [I]."""
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
    """The scales s (float32 [I], positive, finite) under which ``Q(W s) / s`` loses least; 1 where nothing is better.

    ``problems``: weights float [B, O, I] and H float32 [B, I, I] of all that takes this input. Candidates are
    x^a and x^a / w^(1 - a) for ``grid`` exponents a up to 1, of the mean magnitudes ``input_mean_I`` (x) and
    ``weight_means`` (w).
    """
    best_I = torch.ones_like(input_mean_I, dtype=torch.float32)
    least = _loss(problems, best_I, bits, group_size, symmetric)
    for scale_I in _candidates(input_mean_I.float(), weight_mean_I.float(), grid):
        loss = _loss(problems, scale_I, bits, group_size, symmetric)
        if loss < least:
            best_I, least = scale_I, loss
    return best_I


def _candidates(x_I: Tensor, w_I: Tensor, grid: int) -> Iterator[Tensor]:
    for step in range(1, grid + 1):
        exponent = step / grid
        yield _bounded(x_I.pow(exponent))
        yield _bounded(x_I.pow(exponent) / w_I.clamp(min=1e-4).pow(1 - exponent))


def _bounded(scale_I: Tensor) -> Tensor:
    """Around 1 in the middle of its range; an input that was never anything but zero keeps its scale."""
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
    """Scale [B, O, G] and zero point (int8, None if symmetric) of the share of each group's range that loses least.

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
