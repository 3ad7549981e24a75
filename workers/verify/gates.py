"""What the gates say of an artifact's metrics. Pure: facts and thresholds in, an outcome and its reasons out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workers.job import Generation, Metrics, Outcome, Runtime, Thresholds, Verdict

# How a reason begins that thresholds gave.
MEASURED = ("KL divergence", "top-1 agreement", "perplexity ratio", "runtime logits", "eval tokens")
# The first of them that was found is the verdict's.
WEIGHT = (Outcome.REGRESSION, Outcome.ANOMALOUS, Outcome.INFEASIBLE)


@dataclass(frozen=True)
class Facts:
    """What was found out of an artifact: what is wrong with its files, in its runtime, and what was measured."""

    integrity: Sequence[str] = ()
    runtime_problems: Sequence[str] = ()
    infeasible: Sequence[str] = ()
    metrics: Metrics | None = None
    runtime: Runtime | None = None
    worst_layers: tuple[tuple[str, float], ...] = ()
    generations: tuple[Generation, ...] = ()
    promised_tokens: int = 0


def judge(facts: Facts, thresholds: Thresholds) -> Verdict:
    """The verdict: accepted if nothing speaks against it; every reason names the value and the bound."""
    found = [(Outcome.REGRESSION, reason) for reason in (*facts.integrity, *facts.runtime_problems)]
    found += [(Outcome.INFEASIBLE, reason) for reason in facts.infeasible]
    if facts.metrics is not None:
        found += [*_fidelity(facts.metrics, thresholds), *_anomalies(facts.metrics, thresholds, facts.promised_tokens)]
    if facts.runtime is not None:
        found += [(Outcome.REGRESSION, reason) for reason in _runtime(facts.runtime, thresholds)]
    outcomes = {outcome for outcome, _ in found}
    return Verdict(
        accepted=not found,
        outcome=next((outcome for outcome in WEIGHT if outcome in outcomes), Outcome.ACCEPT),
        reasons=tuple(reason for _, reason in found),
        metrics=facts.metrics,
        runtime=facts.runtime,
        worst_layers=facts.worst_layers,
        generations=facts.generations,
    )


def _fidelity(metrics: Metrics, thresholds: Thresholds) -> Iterator[tuple[Outcome, str]]:
    """The bounds of fidelity that are not kept, each by its confidence bound.

    A value beyond its bound is a regression; one within, whose confidence bound isn't, comes of too small a sample.
    """
    # `not (a <= b)` and not `a > b`: NaN keeps no bound.
    if not metrics.kl_mean_upper <= thresholds.kl_mean:
        yield _missed(
            metrics.kl_mean <= thresholds.kl_mean,
            f"KL divergence {metrics.kl_mean:.4f} (95 % bound {metrics.kl_mean_upper:.4f}), "
            f"expected at most {thresholds.kl_mean:g} nats",
            metrics,
        )
    if not metrics.top1_agreement_lower >= thresholds.top1_agreement:
        yield _missed(
            metrics.top1_agreement >= thresholds.top1_agreement,
            f"top-1 agreement {metrics.top1_agreement:.4f} (95 % bound {metrics.top1_agreement_lower:.4f}), "
            f"expected at least {thresholds.top1_agreement:g}",
            metrics,
        )
    if not metrics.perplexity_ratio_upper <= thresholds.perplexity_ratio:
        ratio = metrics.perplexity / metrics.reference_perplexity
        yield _missed(
            ratio <= thresholds.perplexity_ratio,
            f"perplexity ratio {ratio:.4f} (95 % bound {metrics.perplexity_ratio_upper:.4f}), "
            f"expected at most {thresholds.perplexity_ratio:g}",
            metrics,
        )


def _missed(within: bool, reason: str, metrics: Metrics) -> tuple[Outcome, str]:
    if not within:
        return Outcome.REGRESSION, reason
    small = (
        f"{reason}: the value is within, but {metrics.eval_tokens} tokens are too few to be sure; raise verify.tokens"
    )
    return Outcome.INFEASIBLE, small


def _anomalies(metrics: Metrics, thresholds: Thresholds, promised: int) -> Iterator[tuple[Outcome, str]]:
    """Too good to be true, or looked at less than promised."""
    if metrics.kl_mean < thresholds.kl_least:
        yield (
            Outcome.ANOMALOUS,
            f"KL divergence {metrics.kl_mean:.2g}, expected at least {thresholds.kl_least:g}: "
            "this isn't quantized, or was compared with itself",
        )
    if metrics.perplexity_ratio_upper < thresholds.perplexity_ratio_least:
        ratio = metrics.perplexity / metrics.reference_perplexity
        yield (
            Outcome.ANOMALOUS,
            f"perplexity ratio {ratio:.4f} (95 % bound {metrics.perplexity_ratio_upper:.4f}), expected at least "
            f"{thresholds.perplexity_ratio_least:g}: another model than its reference, or one that knows the text",
        )
    if metrics.eval_tokens < promised:
        yield Outcome.ANOMALOUS, f"eval tokens {metrics.eval_tokens}, expected at least the {promised} promised"


def _runtime(runtime: Runtime, thresholds: Thresholds) -> list[str]:
    """Whether the library that loads the artifact sees the model that was measured."""
    if runtime.relative_logit_difference <= thresholds.runtime_logit_difference:
        return []
    return [
        f"runtime logits of {runtime.name} differ from our decoding by {runtime.relative_logit_difference:.3g} "
        f"standard deviations (root mean square; {runtime.max_abs_logit_difference:.3g} at most), "
        f"expected at most {thresholds.runtime_logit_difference:g}"
    ]
