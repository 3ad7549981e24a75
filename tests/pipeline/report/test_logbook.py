"""The run's log keeps what results and messages leave out: the traceback of each failure."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from pipeline.fleet.steps import Step
from pipeline.report.logbook import Logbook
from tests.pipeline.fleet.test_decisions import job
from workers.machine.failures import describe
from workers.spec.job import ArtifactMade, Stage, StageResult


def failure(text: str) -> Exception:
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        return error


def test_failures_are_logged_with_their_tracebacks(tmp_path: Path) -> None:
    alone = ArtifactMade(recipe="bnb-nf4", path="", bytes=0, seconds=0.0, error=describe(failure("odd \x1b[2J")))
    result = StageResult(stage=Stage.QUANTIZE, artifacts=(alone,))
    whole = StageResult(stage=Stage.QUANTIZE, failure=describe(failure("whole \udcff")))
    with closing(Logbook(tmp_path, "run")) as log:
        for ended in (result, whole):
            log.ended(job("bnb-nf4"), Step(0, Stage.QUANTIZE), 1, ended, None)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    (entry,) = first["failed"]
    assert entry["recipe"] == "bnb-nf4"
    assert entry["error"] == r"RuntimeError: odd \x1b[2J"
    for traceback in (entry["traceback"], second["traceback"]):
        assert "raise RuntimeError(text)" in traceback
        assert "test_logbook.py" in traceback
