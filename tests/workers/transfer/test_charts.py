"""Charts of cards: what is drawn, from what, and that it's the same bytes each time."""

from __future__ import annotations

import math
import struct

import pytest

from workers.spec.job import Metrics, Thresholds, Verdict
from workers.transfer import charts

METRICS = Metrics(
    perplexity=20.0, reference_perplexity=19.9, kl_mean=0.003, kl_mean_upper=0.004, kl_p99=0.02, top1_agreement=0.96,
    top1_agreement_lower=0.95, perplexity_ratio_upper=1.01, eval_tokens=512,
)  # fmt: skip
THRESHOLDS = Thresholds(kl_mean=0.1, top1_agreement=0.9, perplexity_ratio=1.1, runtime_logit_difference=0.1)
POINTS = [charts.Point("Q2_K", 10**6, 0.2), charts.Point("Q8_0", 4 * 10**6, 0.001), charts.Point("Q4_0", 10**7, 0.01)]


def verdict(**changed: object) -> Verdict:
    raw = {"accepted": True, "reasons": (), "outcome": "ACCEPT", "metrics": METRICS, "layer_noise": (20.0, None, 21.5)}
    return Verdict.model_validate({**raw, **changed})


def pixels(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def of(shown: Verdict) -> bytes:
    drawn = charts.of_artifact(shown, THRESHOLDS, 10**9, 4 * 10**9)
    assert drawn is not None
    return drawn


def test_it_shows_what_it_is_given_and_is_the_same_each_time() -> None:
    drawn = of(verdict())
    assert pixels(drawn) == (1350, 360)
    assert of(verdict()) == drawn
    different = [verdict(layer_noise=()), verdict(layer_noise=(20.0,) * 80), verdict(layer_noise=(20.0,))]
    different.append(verdict(metrics=METRICS.model_copy(update={"kl_mean": 0.05})))
    assert len({drawn, *map(of, different)}) == 5


@pytest.mark.parametrize("kl", [math.nan, math.inf, None])
def test_without_a_measurement_there_is_none(kl: float | None) -> None:
    metrics = None if kl is None else METRICS.model_copy(update={"kl_mean": kl})
    assert charts.of_artifact(verdict(metrics=metrics), THRESHOLDS, 1, 2) is None
    one_bad = METRICS.model_copy(update={"kl_p99": math.inf})
    assert charts.of_artifact(verdict(metrics=one_bad), THRESHOLDS, 1, 2) is not None


def test_files_are_compared_where_there_are_two() -> None:
    drawn = charts.of_files(POINTS)
    assert drawn is not None
    assert pixels(drawn) == (1050, 540)
    assert charts.of_files(list(reversed(POINTS))) == drawn
    assert charts.of_files(POINTS[:1]) is None
    assert charts.of_files([POINTS[0], charts.Point("Q3_K", 10**6, math.nan)]) is None
