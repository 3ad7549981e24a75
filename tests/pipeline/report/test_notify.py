"""The webhook at the end of a run: what it's told, and that it can't do harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report.notify import message, post
from pipeline.report.results import ArtifactEntry, Results, Seconds
from tests.pipeline.receiver import Receiver
from workers.spec.job import PeakMemory


def entry(recipe: str, status: Any, reason: str | None = None) -> ArtifactEntry:
    return ArtifactEntry(
        model="org/model", revision="r", recipe=recipe, fingerprint="f", status=status, reason=reason, path=None,
        repo_id=None, commit=None, metrics=None, runtime=None, bytes=0, reference_bytes=0, seconds=Seconds(),
        peak_memory_bytes=PeakMemory(), fallbacks=(), attempts=1, error=None,
    )  # fmt: skip


RESULTS = Results(
    run_id="1",
    zoo="small",
    started_at="a",
    finished_at="b",
    status="failed",
    jobs=(),
    artifacts=(entry("one", "published"), entry("two", "rejected", "REGRESSION: KL divergence 3")),
)


def test_it_is_told_the_counts_and_what_was_not_accepted(receiver: Receiver) -> None:
    assert post(receiver.url, message(RESULTS, Path("/out/results.json"))) is None
    (got,) = receiver.got
    assert got["text"].splitlines() == [
        "quantmill small: failed (1 published, 1 rejected)",
        "rejected: model two: REGRESSION: KL divergence 3",
    ]
    assert got["artifacts"] == {"published": 1, "rejected": 1}
    assert [item["recipe"] for item in got["not_accepted"]] == ["two"]


def test_an_answer_that_passes_is_asked_for_again(receiver: Receiver) -> None:
    receiver.answers = [503, 200]
    assert post(receiver.url, {}) is None
    assert len(receiver.got) == 2


def test_a_refusal_is_told_without_the_address(receiver: Receiver) -> None:
    receiver.answers = [403]
    said = post(receiver.url, {})
    assert said is not None
    assert "it answered 403" in said
    assert "secret" not in said
    assert len(receiver.got) == 1


def test_nobody_there_and_no_url_are_told_too() -> None:
    assert "no answer" in (post("http://127.0.0.1:9/secret", {}, seconds=0.5) or "")
    assert "not a URL" in (post("secret", {}) or "")
