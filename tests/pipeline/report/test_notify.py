"""The webhook at the end of a run: what it's told, and that it can't do harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.notify import message, post, tell
from pipeline.report.results import ArtifactEntry, Results, Seconds
from tests.pipeline.receiver import Receiver
from workers.spec import plugins
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


HEARD: list[dict[str, Any]] = []


def _hears(content: dict[str, Any]) -> None:
    HEARD.append(dict(content))
    content.clear()


def _fails(content: dict[str, Any]) -> None:
    raise OSError("no route\nto the pager")


def _hangs(content: dict[str, Any]) -> None:
    time.sleep(30)


def test_notifiers_are_told_each_and_none_of_them_stops_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, where in {"a": _fails, "b": _hangs, "c": _hears, "d": _hears}.items():
        monkeypatch.setitem(plugins.NOTIFIERS, name, f"{__name__}:{where.__name__}")
    HEARD.clear()
    begun = time.monotonic()
    problems = tell({"text": "over"}, seconds=0.5)
    assert time.monotonic() - begun < 5
    assert problems == [
        "notifier 'a': no route to the pager; the run itself is not concerned",
        "notifier 'b': it hasn't returned in 0.5 s; the run itself is not concerned",
    ]
    assert HEARD == [{"text": "over"}] * 2, "what one does to its content, the next one doesn't see"
