"""Measures of the difference between two models' predictions.

N tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ELEMENTS_AT_A_TIME = 1 << 24  # bounds float64 temporaries to 128 MiB each, whatever the vocabulary


def kl_divergence(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(reference || other) in nats for each token, float64 [N], exact over the whole vocabulary.

    Tokens that are impossible in the reference (a logit of -inf) add nothing; tokens impossible only in the other give
    infinity.
    """
    rows = _rows_at_a_time(reference_NV)
    pieces = zip(torch.split(reference_NV, rows), torch.split(logits_NV, rows), strict=True)
    return torch.cat([_kl_divergence(reference, logits) for reference, logits in pieces])


def _kl_divergence(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    p_NV = reference_NV.double().log_softmax(-1)
    q_NV = logits_NV.double().log_softmax(-1)
    # -inf minus -inf would be NaN; the limit of p log p is 0.
    return (p_NV.exp() * (p_NV - q_NV).masked_fill_(p_NV == -math.inf, 0)).sum(-1)


def _rows_at_a_time(logits_NV: Tensor) -> int:
    return max(1, ELEMENTS_AT_A_TIME // logits_NV.shape[-1])


def top1_agreement(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Whether the most likely token is the same: bool [N]."""
    return reference_NV.argmax(-1) == logits_NV.argmax(-1)


def negative_log_likelihood(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) in nats for each token, float64 [N]."""
    rows = _rows_at_a_time(logits_NV)
    pieces = zip(torch.split(logits_NV, rows), torch.split(targets_N, rows), strict=True)
    return torch.cat([-p.double().log_softmax(-1).gather(-1, t[:, None]).squeeze(-1) for p, t in pieces])


def wilson_lower_bound(successes: int, trials: int, z: float = 1.96) -> float:
    """Lower end of the Wilson score interval for a proportion (Wilson 1927, equation 3); 0 without trials."""
    if successes == 0:  # exact value of the formula, which rounding errors would miss
        return 0.0
    share, square = successes / trials, z * z / trials
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (share + square / 2 - spread) / (1 + square))


def bootstrap_interval(values_N: Tensor, confidence: float = 0.95, resamples: int = 4000) -> tuple[float, float]:
    """Confidence interval for the mean of independent values, float [N], by the bootstrap-t (Efron 1979, Hall 1988).

    No shape is assumed, and a small sample gives a wide interval: an infinite one for fewer than two values. The result
    is deterministic.
    """
    values = values_N.double().cpu()
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    mean, error = values.mean(), values.std() / math.sqrt(count)
    generator = torch.Generator().manual_seed(0)
    drawn_RN = values[torch.randint(count, (resamples, count), generator=generator)]
    errors_R = drawn_RN.std(-1) / math.sqrt(count)
    # A resample of one repeated value has no standard error; its statistic counts as infinite.
    studentized_R = torch.where(errors_R > 0, (drawn_RN.mean(-1) - mean) / errors_R, math.inf)
    tail = (1 - confidence) / 2
    highest = _quantile(studentized_R, 1 - tail)
    lowest = _quantile(torch.where(studentized_R == math.inf, -math.inf, studentized_R), tail)
    if error == 0:
        return mean.item(), mean.item()
    return float(mean - error * highest), float(mean - error * lowest)


def _quantile(values_R: Tensor, share: float) -> float:
    """The order statistic; torch.quantile would interpolate, which fails for infinities."""
    return float(values_R.sort().values[min(len(values_R) - 1, max(0, math.ceil(share * len(values_R)) - 1))])


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum x^2 / sum (x - y)^2); infinite if they are equal."""
    signal, noise = powers(reference, other).tolist()
    return decibels(signal, noise)


def powers(reference: Tensor, other: Tensor) -> Tensor:
    """Powers of signal and noise, sum x^2 and sum (x - y)^2, float64 [2] on the tensors' device."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=reference.device)
    pieces = (torch.split(tensor.flatten(), ELEMENTS_AT_A_TIME) for tensor in (reference, other))
    for x, y in zip(*pieces, strict=True):
        exact = x.double()
        signal = signal + exact.square().sum()
        noise = noise + (exact - y).square_().sum()
    return torch.stack([signal, noise])


def decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio of powers; infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
