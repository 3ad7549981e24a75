"""What the gates say of an artifact's metrics. Pure: facts and thresholds in, reasons out."""

from __future__ import annotations

from collections.abc import Sequence

from workers.job import Metrics, Runtime, Thresholds, Verdict

# How a reason begins that thresholds gave.
MEASURED = ("KL divergence", "top-1 agreement", "perplexity ratio", "runtime logits")


def judge(
    integrity: Sequence[str],
    metrics: Metrics | None,
    runtime: Runtime | None,
    runtime_problems: Sequence[str],
    thresholds: Thresholds,
    worst_layers: tuple[tuple[str, float], ...] = (),
) -> Verdict:
    """The verdict: accepted if nothing speaks against it; every reason names the value and the bound."""
    reasons = [*integrity, *runtime_problems]
    if metrics is not None:
        reasons += fidelity_problems(metrics, thresholds)
    if runtime is not None:
        reasons += runtime_gate(runtime, thresholds)
    return Verdict(
        accepted=not reasons, reasons=tuple(reasons), metrics=metrics, runtime=runtime, worst_layers=worst_layers
    )


def fidelity_problems(metrics: Metrics, thresholds: Thresholds) -> list[str]:
    """The bounds of fidelity that are not kept, each by its confidence bound."""
    found = []
    # `not (a <= b)` and not `a > b`: NaN keeps no bound.
    if not metrics.kl_mean_upper <= thresholds.kl_mean:
        found.append(
            f"KL divergence {metrics.kl_mean:.4f} (95 % bound {metrics.kl_mean_upper:.4f}), "
            f"expected at most {thresholds.kl_mean:g} nats"
        )
    if not metrics.top1_agreement_lower >= thresholds.top1_agreement:
        found.append(
            f"top-1 agreement {metrics.top1_agreement:.4f} (95 % bound {metrics.top1_agreement_lower:.4f}), "
            f"expected at least {thresholds.top1_agreement:g}"
        )
    if not metrics.perplexity_ratio_upper <= thresholds.perplexity_ratio:
        ratio = metrics.perplexity / metrics.reference_perplexity
        found.append(
            f"perplexity ratio {ratio:.4f} (95 % bound {metrics.perplexity_ratio_upper:.4f}), "
            f"expected at most {thresholds.perplexity_ratio:g}"
        )
    return found


def runtime_gate(runtime: Runtime, thresholds: Thresholds) -> list[str]:
    """Whether the library that loads the artifact sees the model that was measured."""
    if runtime.relative_logit_difference <= thresholds.runtime_logit_difference:
        return []
    return [
        f"runtime logits of {runtime.name} differ from our decoding by {runtime.relative_logit_difference:.3g} "
        f"standard deviations (root mean square; {runtime.max_abs_logit_difference:.3g} at most), "
        f"expected at most {thresholds.runtime_logit_difference:g}"
    ]
