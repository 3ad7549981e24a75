"""Judges an artifact's metrics by thresholds, and by the gates that plugins add: evidence in, a verdict out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from workers.spec import plugins
from workers.spec.job import (
    Generation,
    Metrics,
    Outcome,
    PictureCheck,
    ReasonCode,
    RuntimeAgreement,
    Thresholds,
    Verdict,
)
from workers.spec.recipes import Recipe

# Outcomes by severity: the verdict takes the first one present.
WEIGHT = (Outcome.REGRESSION, Outcome.ANOMALOUS, Outcome.INFEASIBLE)
# How many times the text's bound the KL divergence after a picture may be: it is one prompt's, and the text's bound is
# for a mean over thousands of tokens. A tower that isn't where its class looks for it costs more.
PICTURE_FACTOR = 5.0


@dataclass(frozen=True)
class Evidence:
    """Evidence about an artifact: problems of its files and of its runtime, and measurements."""

    integrity: Sequence[str] = ()
    runtime_problems: Sequence[str] = ()
    infeasible: Sequence[str] = ()
    metrics: Metrics | None = None
    runtime: RuntimeAgreement | None = None
    other_runtimes: tuple[RuntimeAgreement, ...] = ()
    worst_layers: tuple[tuple[str, float], ...] = ()
    layer_noise: tuple[float | None, ...] = ()
    generations: tuple[Generation, ...] = ()
    promised_tokens: int = 0
    picture: PictureCheck | None = None


class Reason(NamedTuple):
    """One reason against an artifact: its outcome, its code, and a sentence."""

    outcome: Outcome
    code: ReasonCode
    text: str


class Judged(NamedTuple):
    """What a plugin's gate is given: the thresholds' verdict, the artifact's folder, and its recipe.

    ``recipe`` is None for a checkpoint of another tool.
    """

    verdict: Verdict
    folder: Path
    recipe: Recipe | None = None


def judge(facts: Evidence, thresholds: Thresholds, folder: Path, recipe: Recipe | None = None) -> Verdict:
    """Judge the artifact in ``folder`` by thresholds and by the gates that plugins add."""
    reasons = _by_thresholds(facts, thresholds)
    return _verdict(facts, [*reasons, *_by_plugins(Judged(_verdict(facts, reasons), folder, recipe))])


def by_thresholds(facts: Evidence, thresholds: Thresholds) -> Verdict:
    """Judge by thresholds alone: accepted if there is no reason against it; a reason names the value and the bound."""
    return _verdict(facts, _by_thresholds(facts, thresholds))


def _by_plugins(judged: Judged) -> list[Reason]:
    """What plugins' gates have against an artifact; one that fails leaves it undecided."""
    reasons = []
    for name, where in plugins.GATES.items():
        try:
            found = plugins.resolved(where)(judged)
            said = [found] if isinstance(found, str) else [str(text) for text in found]
        except Exception as error:  # a plugin raises whatever it likes
            why = " ".join(str(error).split()) or type(error).__name__
            text = f"gate {name!r} failed ({why}); mend the plugin, or leave it out"
            reasons.append(Reason(Outcome.INFEASIBLE, ReasonCode.GATE, text))
        else:
            reasons += [Reason(Outcome.REGRESSION, ReasonCode.GATE, f"gate {name!r}: {text}") for text in said]
    return reasons


def _by_thresholds(facts: Evidence, thresholds: Thresholds) -> list[Reason]:
    reasons = [Reason(Outcome.REGRESSION, ReasonCode.INTEGRITY, text) for text in facts.integrity]
    reasons += [Reason(Outcome.REGRESSION, ReasonCode.RUNTIME, text) for text in facts.runtime_problems]
    reasons += [Reason(Outcome.INFEASIBLE, ReasonCode.INFEASIBLE, text) for text in facts.infeasible]
    if facts.metrics is not None:
        reasons += _fidelity(facts.metrics, thresholds)
        reasons += _anomalies(facts.metrics, thresholds, facts.promised_tokens)
    for runtime in (*((facts.runtime,) if facts.runtime else ()), *facts.other_runtimes):
        reasons += _runtime(runtime, thresholds)
    if facts.picture is not None and not facts.picture.unchecked:
        reasons += _picture(facts.picture, thresholds)
    return reasons


def _verdict(facts: Evidence, reasons: Sequence[Reason]) -> Verdict:
    outcomes = {reason.outcome for reason in reasons}
    return Verdict(
        accepted=not reasons,
        outcome=next((outcome for outcome in WEIGHT if outcome in outcomes), Outcome.ACCEPT),
        reasons=tuple(reason.text for reason in reasons),
        codes=tuple(reason.code for reason in reasons),
        metrics=facts.metrics,
        runtime=facts.runtime,
        other_runtimes=facts.other_runtimes,
        worst_layers=facts.worst_layers,
        layer_noise=facts.layer_noise,
        generations=facts.generations,
        picture=facts.picture,
    )


def _fidelity(metrics: Metrics, thresholds: Thresholds) -> Iterator[Reason]:
    """Yield the fidelity thresholds that are missed, each judged by its confidence bound.

    A value beyond its threshold is a regression; if only the confidence bound is beyond, the sample is too small.
    """
    # `not (a <= b)` instead of `a > b`, so that NaN misses every threshold.
    if not metrics.kl_mean_upper <= thresholds.kl_mean:
        yield _missed(
            ReasonCode.KL,
            metrics.kl_mean <= thresholds.kl_mean,
            f"KL divergence {metrics.kl_mean:.4f} (95 % bound {metrics.kl_mean_upper:.4f}), "
            f"expected at most {thresholds.kl_mean:g} nats",
            metrics,
        )
    if not metrics.top1_agreement_lower >= thresholds.top1_agreement:
        yield _missed(
            ReasonCode.TOP1,
            metrics.top1_agreement >= thresholds.top1_agreement,
            f"top-1 agreement {metrics.top1_agreement:.4f} (95 % bound {metrics.top1_agreement_lower:.4f}), "
            f"expected at least {thresholds.top1_agreement:g}",
            metrics,
        )
    if not metrics.perplexity_ratio_upper <= thresholds.perplexity_ratio:
        ratio = metrics.perplexity / metrics.reference_perplexity
        yield _missed(
            ReasonCode.PERPLEXITY,
            ratio <= thresholds.perplexity_ratio,
            f"perplexity ratio {ratio:.4f} (95 % bound {metrics.perplexity_ratio_upper:.4f}), "
            f"expected at most {thresholds.perplexity_ratio:g}",
            metrics,
        )


def _missed(code: ReasonCode, within: bool, text: str, metrics: Metrics) -> Reason:
    if not within:
        return Reason(Outcome.REGRESSION, code, text)
    small = f"{text}: the value is within, but {metrics.eval_tokens} tokens are too few to be sure; raise verify.tokens"
    return Reason(Outcome.INFEASIBLE, code, small)


def _anomalies(metrics: Metrics, thresholds: Thresholds, promised: int) -> Iterator[Reason]:
    """Yield reasons for implausibly good values, and for fewer evaluated tokens than promised."""
    if metrics.kl_mean < thresholds.kl_least:
        yield Reason(
            Outcome.ANOMALOUS,
            ReasonCode.KL,
            f"KL divergence {metrics.kl_mean:.2g}, expected at least {thresholds.kl_least:g}: "
            "this isn't quantized, or was compared with itself",
        )
    if metrics.perplexity_ratio_upper < thresholds.perplexity_ratio_least:
        ratio = metrics.perplexity / metrics.reference_perplexity
        yield Reason(
            Outcome.ANOMALOUS,
            ReasonCode.PERPLEXITY,
            f"perplexity ratio {ratio:.4f} (95 % bound {metrics.perplexity_ratio_upper:.4f}), expected at least "
            f"{thresholds.perplexity_ratio_least:g}: another model than its reference, or one that knows the text",
        )
    if metrics.eval_tokens < promised:
        text = f"eval tokens {metrics.eval_tokens}, expected at least the {promised} promised"
        yield Reason(Outcome.ANOMALOUS, ReasonCode.EVAL_TOKENS, text)


def _runtime(runtime: RuntimeAgreement, thresholds: Thresholds) -> Iterator[Reason]:
    """Yield a reason if the runtime's logits differ too much from our decoder's."""
    if runtime.relative_logit_difference <= thresholds.runtime_logit_difference:
        return
    text = (
        f"runtime logits of {runtime.name} differ from our decoding by {runtime.relative_logit_difference:.3g} "
        f"standard deviations (root mean square; {runtime.max_abs_logit_difference:.3g} at most), "
        f"expected at most {thresholds.runtime_logit_difference:g}"
    )
    yield Reason(Outcome.REGRESSION, ReasonCode.RUNTIME_LOGITS, text)


def _picture(picture: PictureCheck, thresholds: Thresholds) -> Iterator[Reason]:
    """Yield a reason if the artifact makes something else of a picture than its source."""
    bound = PICTURE_FACTOR * thresholds.kl_mean
    if picture.kl_mean <= bound:
        return
    text = f"KL divergence after a picture {picture.kl_mean:.4f} on {picture.tokens} tokens, expected at most {bound:g}"
    yield Reason(Outcome.REGRESSION, ReasonCode.PICTURE, f"{text} nats")
