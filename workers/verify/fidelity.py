"""Measures fidelity: an artifact's predictions against its reference's, on text that wasn't used for calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from workers.numerics import divergence
from workers.spec.job import Metrics

# (reference, artifact) logits [R, V] of some successive tokens of a sequence.
Pair = tuple[Tensor, Tensor]


def compare(sequences: Iterable[Iterable[Pair]], tokens: Iterable[Tensor]) -> Metrics:
    """Compute metrics over sequences: for each its logits, in pieces of rows, and its tokens.

    Tokens of one sequence aren't independent, so the confidence bounds use sequences as samples.
    """
    kl: list[Tensor] = []
    agree: list[Tensor] = []
    reference_nll: list[Tensor] = []
    log_ratio: list[Tensor] = []
    for pieces, tokens_T in zip(sequences, tokens, strict=True):
        measured = zip(*_measured(pieces, tokens_T), strict=True)
        for values, found in zip((kl, agree, reference_nll, log_ratio), measured, strict=True):
            values.append(torch.cat(found))
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


def _measured(pieces: Iterable[Pair], tokens_T: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each piece's tokens: KL, whether the first choice agrees, -log p in the reference, and log p's difference."""
    start = 0
    for reference_RV, ours_RV in pieces:
        start, first = start + len(reference_RV), start
        targets = tokens_T[first + 1 : start + 1].to(reference_RV.device)  # the last token of all has none
        theirs = divergence.negative_log_likelihood(reference_RV[: len(targets)], targets)
        ours = divergence.negative_log_likelihood(ours_RV[: len(targets)], targets)
        kl = divergence.kl_divergence(reference_RV, ours_RV)
        yield kl, divergence.top1_agreement(reference_RV, ours_RV), theirs, ours - theirs


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
