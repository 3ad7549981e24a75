"""AWQ (arXiv 2306.00978): scales of the inputs and clipped ranges that minimize the loss of rounding to nearest.

The paper measures an output's error by forwards; here it is computed from H = X^T X alone: tr(E H E^T), the same sum.
B stacked problems, C candidates, O output features, I input features, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.numerics import rounding
from workers.numerics.pieces import trials_at_a_time
from workers.numerics.waits import numbers

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
    ones_I = torch.ones_like(x_I)
    families = [_Family(x_I.pow), _Family(lambda a: x_I.pow(a) / w_I.pow(1 - a))]

    def try_(steps: Sequence[Sequence[int]], *others: Tensor) -> list[float]:
        """Evaluate a round: each family's steps, and others, whose losses are returned. A card is waited for once."""
        new = [sorted(set(given) - family.tried.keys()) for family, given in zip(families, steps, strict=True)]
        raw = [family.scale_of(step / grid) for family, given in zip(families, new, strict=True) for step in given]
        if not raw and not others:
            return []
        scale_CI = torch.cat([*([_bounded(torch.stack(raw))] if raw else []), *(other[None] for other in others)])
        losses_C = _losses(problems[0], scale_CI, bits, group_size, symmetric)
        for problem in problems[1:]:
            losses_C += _losses(problem, scale_CI, bits, group_size, symmetric)
        losses: list[float] = losses_C.tolist()
        found = iter(zip(losses, scale_CI, strict=True))
        for family, given in zip(families, new, strict=True):
            family.tried.update({step: next(found) for step in given})
        return losses[len(raw) :]

    stride = max(grid // 4, 1)
    steps: list[Sequence[int]] = [range(stride, grid + 1, stride)] * len(families)
    (unscaled,) = try_(steps, ones_I)
    best = [family.best(given) for family, given in zip(families, steps, strict=True)]
    while stride > 1:
        stride = (stride + 1) // 2
        steps = [(step, max(step - stride, 1), min(step + stride, grid)) for step in best]
        try_(steps)
        best = [family.best(given) for family, given in zip(families, steps, strict=True)]
    candidates = [(unscaled, ones_I), *(family.tried[step] for family, step in zip(families, best, strict=True))]
    return min(candidates, key=lambda candidate: candidate[0])[1]


@dataclass(frozen=True)
class _Family:
    """Candidates for exponents; ``tried`` are the loss and the scales of each step that was evaluated."""

    scale_of: Callable[[float], Tensor]
    tried: dict[int, tuple[float, Tensor]] = field(default_factory=dict)

    def best(self, steps: Sequence[int]) -> int:
        """The first of the steps with the minimum loss."""
        return min(steps, key=lambda step: self.tried[step][0])


def _bounded(scale_CI: Tensor) -> Tensor:
    """Center each candidate's range around 1, and clamp it; an input that was always zero keeps scale 1."""
    unseen_CI = ~((scale_CI > 0) & (scale_CI < torch.inf))
    largest_C1 = scale_CI.masked_fill(unseen_CI, 0.0).amax(-1, keepdim=True)
    least_C1 = scale_CI.masked_fill(unseen_CI, torch.inf).amin(-1, keepdim=True)
    middle_C1 = (largest_C1 * least_C1).sqrt_()
    return (scale_CI / middle_C1).masked_fill_(unseen_CI, 1.0).clamp_(LEAST, MOST)


def _losses(problem: Problem, scale_CI: Tensor, bits: int, group_size: int | None, symmetric: bool) -> Tensor:
    """The loss of each candidate, float64 [C]; as many at a time as a piece holds."""
    w_B1OI, h_BII = problem[0].float().unsqueeze(1), problem[1]
    losses = []
    for some_CI in torch.split(scale_CI, trials_at_a_time(w_B1OI.numel(), w_B1OI.device)):
        scale_C1I = some_CI[:, None]
        scaled_BCOI = w_B1OI * scale_C1I
        groups = torch.unflatten(scaled_BCOI, -1, (-1, group_size or scaled_BCOI.shape[-1]))
        scale, zero = rounding.params_of(rounding.extent(groups, symmetric=symmetric), bits)
        scale, zero = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        error_BCOI = rounding.rounding_noise(groups, scale, zero, bits).flatten(-2).div_(scale_C1I)
        product = (error_BCOI.flatten(1, 2) @ h_BII).view_as(error_BCOI)
        losses.append(product.mul_(error_BCOI).sum((0, 2, 3), dtype=torch.float64))
    return torch.cat(losses)


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
    clip_C111 = numbers(CLIPS, w_BOI.device)[:, None, None, None]
    clipped = rounding.shrunken(rounding.extent(groups_BGOg, symmetric=symmetric), clip_C111)
    scale_CBGO, zero_CBGO = rounding.params_of(clipped, bits, scale_dtype)
    loss_CBGO = torch.empty(scale_CBGO.shape, device=scale_CBGO.device)
    at_once = trials_at_a_time(groups_BGOg.numel(), groups_BGOg.device)
    for start in range(0, len(CLIPS), at_once):
        clips = slice(start, start + at_once)
        scale = scale_CBGO[clips].float().unsqueeze(-1)
        zero = None if zero_CBGO is None else zero_CBGO[clips].unsqueeze(-1)
        error_cBGOg = rounding.rounding_noise(groups_BGOg, scale, zero, bits)
        torch.sum((error_cBGOg @ blocks_BGgg).mul_(error_cBGOg), -1, out=loss_CBGO[clips])
    best_1BGO = rounding.first_least(loss_CBGO)
    scale_BGO = scale_CBGO.gather(0, best_1BGO)[0]
    zero_BGO = None if zero_CBGO is None else zero_CBGO.gather(0, best_1BGO)[0]
    return scale_BGO.transpose(1, 2), None if zero_BGO is None else zero_BGO.transpose(1, 2)
