"""Measures fidelity: an artifact's predictions against its reference's, on text that wasn't used for calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from workers.numerics import divergence
from workers.spec.job import Metrics


def compare(pairs: Iterable[tuple[Tensor, Tensor]], tokens: Iterable[Tensor]) -> Metrics:
    """Compute metrics over sequences: for each its (reference, artifact) logits [T, V], and its tokens.

    Tokens of one sequence aren't independent, so the confidence bounds use sequences as samples.
    """
    kl, agree, log_ratio, reference_nll = [], [], [], []
    for (reference_TV, ours_TV), tokens_T in zip(pairs, tokens, strict=True):
        kl.append(divergence.kl_divergence(reference_TV, ours_TV))
        agree.append(divergence.top1_agreement(reference_TV, ours_TV))
        targets = tokens_T[1:].to(reference_TV.device)
        theirs = divergence.negative_log_likelihood(reference_TV[:-1], targets)
        reference_nll.append(theirs)
        log_ratio.append(divergence.negative_log_likelihood(ours_TV[:-1], targets) - theirs)
    all_kl, all_agree = torch.cat(kl), torch.cat(agree)
    mean_nll = torch.cat(reference_nll).mean().item()
    mean_ratio = torch.cat(log_ratio).mean().item()
    hits, count = int(all_agree.sum()), all_agree.numel()
    _, kl_upper = divergence.bootstrap_interval(torch.stack([values.mean() for values in kl]))
    ratio = divergence.bootstrap_interval(torch.stack([values.mean() for values in log_ratio]))
    return Metrics(
        perplexity=_exp(mean_nll + mean_ratio),
        reference_perplexity=_exp(mean_nll),
        kl_mean=all_kl.mean().item(),
        kl_mean_upper=kl_upper,
        kl_p99=all_kl.quantile(0.99).item() if count < 1 << 24 else all_kl.kthvalue(math.ceil(0.99 * count))[0].item(),
        top1_agreement=hits / count,
        top1_agreement_lower=divergence.wilson_lower_bound(hits, count),
        perplexity_ratio_upper=_bound(ratio[1]),
        eval_tokens=count,
        perplexity_ratio_lower=_bound(ratio[0]),
    )


def _exp(value: float) -> float:
    """Exponential, clamped at e**700; infinite for NaN, so that NaN fails every bound."""
    return math.exp(min(value, 700.0)) if not math.isnan(value) else math.inf


def _bound(value: float) -> float:
    """The ratio of a log ratio; infinite if the sample is too small for a bound."""
    return math.exp(value) if value < 700 else math.inf


def rows(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the sequences of batches one by one."""
    for batch in batches:
        yield from batch
