"""How far one model's predictions are from another's.

N tokens, V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor


def kl_divergence(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(reference || other) in nats for each token, float64 [N], exact over the whole vocabulary."""
    p_NV = reference_NV.double().log_softmax(-1)
    q_NV = logits_NV.double().log_softmax(-1)
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def top1_agreement(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """Whether the most likely token is the same: bool [N]."""
    return reference_NV.argmax(-1) == logits_NV.argmax(-1)


def negative_log_likelihood(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) in nats for each token, float64 [N]."""
    return -logits_NV.double().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def wilson_lower_bound(successes: int, trials: int, z: float = 1.96) -> float:
    """Lower end of the Wilson score interval for a proportion (Wilson 1927, equation 3); 0 without trials."""
    if trials == 0:
        return 0.0
    share, square = successes / trials, z * z / trials
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (share + square / 2 - spread) / (1 + square))


def upper_bound_of_mean(values: Tensor, z: float = 1.96) -> float:
    """Upper end of the normal interval for a mean of independent values: float [N]; infinite for fewer than two."""
    if len(values) < 2:
        return math.inf
    return float(values.mean() + z * values.double().std() / math.sqrt(len(values)))


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum x^2 / sum (x - y)^2); infinite if they are equal."""
    noise = (reference.double() - other.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
