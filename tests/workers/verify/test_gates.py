"""Which facts lead to which outcome."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from workers.spec import plugins
from workers.spec.job import Metrics, Outcome, ReasonCode, RuntimeAgreement, Thresholds, Verdict
from workers.verify.gates import Evidence, Judged, by_thresholds, judge

THRESHOLDS = Thresholds(
    kl_mean=0.1, top1_agreement=0.9, perplexity_ratio=1.1, runtime_logit_difference=0.1, kl_least=1e-6
)
GOOD: dict[str, Any] = {
    "perplexity": 10.2, "reference_perplexity": 10.0, "kl_mean": 0.01, "kl_mean_upper": 0.012, "kl_p99": 0.1,
    "top1_agreement": 0.95, "top1_agreement_lower": 0.94, "perplexity_ratio_upper": 1.03, "eval_tokens": 4096,
    "perplexity_ratio_lower": 1.01,
}  # fmt: skip
RUNTIME = RuntimeAgreement(
    name="transformers", version="5", max_abs_logit_difference=0.1, relative_logit_difference=0.01, generated=""
)


def verdict(metrics: dict[str, Any] | None = None, **facts: Any) -> Verdict:
    measured = Metrics(**{**GOOD, **(metrics or {})})
    found = Evidence(**{"metrics": measured, "runtime": RUNTIME, "promised_tokens": 4096, **facts})
    return by_thresholds(found, THRESHOLDS)


def test_what_keeps_all_bounds_is_accepted() -> None:
    found = verdict()
    assert (found.accepted, found.outcome, found.reasons) == (True, Outcome.ACCEPT, ())


@pytest.mark.parametrize(
    ("metrics", "facts", "outcome", "said"),
    [
        ({"kl_mean": 0.2, "kl_mean_upper": 0.3}, {}, Outcome.REGRESSION, "KL divergence 0.2000"),
        ({"kl_mean": math.nan, "kl_mean_upper": math.nan}, {}, Outcome.REGRESSION, "KL divergence nan"),
        ({"top1_agreement": 0.8, "top1_agreement_lower": 0.7}, {}, Outcome.REGRESSION, "top-1 agreement 0.8000"),
        ({"perplexity": 13, "perplexity_ratio_upper": 1.4}, {}, Outcome.REGRESSION, "perplexity ratio 1.3000"),
        ({}, {"integrity": ["integrity: x"]}, Outcome.REGRESSION, "integrity: x"),
        ({}, {"runtime_problems": ["runtime: x"]}, Outcome.REGRESSION, "runtime: x"),
        (
            {},
            {"runtime": RUNTIME.model_copy(update={"relative_logit_difference": 0.5})},
            Outcome.REGRESSION,
            "runtime logits",
        ),
        ({"kl_mean_upper": 0.3}, {}, Outcome.INFEASIBLE, "4096 tokens are too few to be sure"),
        ({"top1_agreement_lower": 0.8}, {}, Outcome.INFEASIBLE, "too few to be sure"),
        ({"perplexity_ratio_upper": math.inf}, {}, Outcome.INFEASIBLE, "too few to be sure"),
        ({}, {"infeasible": ["runtime: not here"], "runtime": None}, Outcome.INFEASIBLE, "not here"),
        ({"kl_mean": 1e-8, "kl_mean_upper": 1e-8}, {}, Outcome.ANOMALOUS, "this isn't quantized"),
        ({"perplexity": 9, "perplexity_ratio_upper": 0.92}, {}, Outcome.ANOMALOUS, "another model"),
        ({"eval_tokens": 2048}, {}, Outcome.ANOMALOUS, "eval tokens 2048, expected at least the 4096 promised"),
    ],
)
def test_what_does_not_is_not(metrics: dict[str, Any], facts: dict[str, Any], outcome: Outcome, said: str) -> None:
    found = verdict(metrics, **facts)
    assert not found.accepted
    assert found.outcome is outcome
    assert len(found.reasons) == 1
    assert said in found.reasons[0]


def test_the_gravest_finding_is_the_outcome_and_all_are_reasons() -> None:
    found = verdict({"kl_mean_upper": 0.3, "eval_tokens": 10}, integrity=["integrity: broken"])
    assert found.outcome is Outcome.REGRESSION
    assert len(found.reasons) == 3
    assert verdict({"kl_mean_upper": 0.3, "eval_tokens": 10}).outcome is Outcome.ANOMALOUS


def test_a_verdict_survives_its_manifest() -> None:
    found = verdict({"perplexity_ratio_upper": math.inf})
    assert Verdict.model_validate_json(found.model_dump_json()) == found
    # One of a manifest from before there were outcomes.
    assert Verdict.model_validate({"accepted": False, "reasons": ("x",)}).outcome is Outcome.REGRESSION


def test_reasons_have_codes_and_nothing_reads_their_words() -> None:
    rejected = verdict(
        {"kl_mean_upper": 0.3, "top1_agreement_lower": 0.1, "eval_tokens": 10},
        integrity=["integrity: broken"],
        runtime_problems=["runtime transformers: missing keys"],
        infeasible=["runtime transformers: can't be tried here"],
    )
    assert rejected.codes == (
        ReasonCode.INTEGRITY, ReasonCode.RUNTIME, ReasonCode.INFEASIBLE, ReasonCode.KL, ReasonCode.TOP1,
        ReasonCode.EVAL_TOKENS,
    )  # fmt: skip
    assert len(rejected.codes) == len(rejected.reasons)
    assert [code.by_threshold for code in rejected.codes] == [False, False, False, True, True, False]
    # One of a manifest from before there were codes isn't judged again by its words.
    older = Verdict.model_validate({"accepted": False, "reasons": ("KL divergence 1",), "outcome": "REGRESSION"})
    assert older.codes == (ReasonCode.UNSAID,)
    assert not older.codes[0].by_threshold


def test_the_manifest_of_what_is_accepted_has_no_codes() -> None:
    assert "codes" not in verdict().model_dump()
    assert '"codes"' not in verdict().model_dump_json()


def _has_nothing(judged: Judged) -> Iterable[str]:
    assert judged.verdict.metrics is not None
    assert judged.folder == Path("artifact")
    return []


def _has_a_sentence(judged: Judged) -> Iterable[str]:
    return "it has no licence"


def _raises(judged: Judged) -> Iterable[str]:
    raise KeyError("licence")


@pytest.mark.parametrize(
    ("gate", "outcome", "reasons"),
    [
        (_has_nothing, Outcome.ACCEPT, ()),
        (_has_a_sentence, Outcome.REGRESSION, ("gate 'house': it has no licence",)),
        (_raises, Outcome.INFEASIBLE, ("gate 'house' failed ('licence'); mend the plugin, or leave it out",)),
    ],
)
def test_gates_of_plugins_judge_beside_the_thresholds(
    monkeypatch: pytest.MonkeyPatch, gate: Any, outcome: Outcome, reasons: tuple[str, ...]
) -> None:
    monkeypatch.setitem(plugins.GATES, "house", f"{__name__}:{gate.__name__}")
    made = judge(Evidence(metrics=Metrics(**GOOD), runtime=RUNTIME), THRESHOLDS, Path("artifact"))
    assert (made.outcome, made.reasons, made.accepted) == (outcome, reasons, not reasons)
    assert set(made.codes) <= {ReasonCode.GATE}
    assert all(code.by_threshold for code in made.codes), "another gate may judge the same files"
    missed = judge(Evidence(integrity=["torn"]), THRESHOLDS, Path("artifact")) if gate is not _has_nothing else None
    assert missed is None or missed.reasons == ("torn", *reasons), "none hides what the thresholds say"
