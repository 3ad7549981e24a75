"""A run is followed from another process: stages as they end, then how it ended."""

import fcntl
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline import watching
from pipeline.cli.main import main
from pipeline.ending import LOCK
from pipeline.report.ledger import Attempt, Ledger
from workers.errors import ZooError
from workers.spec.job import Failure, Stage, StageResult

RUN = "20261126-010203-zoo-0001"


def record(out: Path, stage: Stage, failure: Failure | None = None) -> None:
    result = StageResult(stage=stage, node="here", seconds=1.5, failure=failure)
    with Ledger(out) as ledger:
        ledger.record(RUN, Attempt("llama", "0" * 40, "gptq-w4-g128", "f" * 64, 1), result)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with Ledger(tmp_path) as ledger:
        ledger.start(RUN, "zoo", "2026-11-26T01:02:03+00:00")
    record(tmp_path, Stage.FETCH)
    return tmp_path


def test_stages_are_told_once_as_they_end(out: Path) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1:
            record(out, Stage.QUANTIZE)
            record(out, Stage.VERIFY, Failure(kind="CheckpointError", message="a scale is negative"))
        elif len(waited) == 3:
            with Ledger(out) as ledger:
                ledger.finish(RUN, "2026-11-26T01:03:03+00:00", "failed")

    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = list(watching.watch(out, watching.newest(out), wait))
    assert len(waited) == 3
    assert lines[0] == f"run {RUN} of zoo zoo, begun 2026-11-26T01:02:03+00:00"
    assert [line.partition(" ")[2] for line in lines[1:4]] == [
        "llama gptq-w4-g128: fetch ok after 1.5 s",
        "llama gptq-w4-g128: quantize ok after 1.5 s",
        "llama gptq-w4-g128: verify failed after 1.5 s: CheckpointError: a scale is negative",
    ]
    assert lines[4:] == [f"run {RUN}: failed"]


def test_a_run_whose_driver_is_gone_died(out: Path) -> None:
    done = CliRunner().invoke(main, ["status", "--watch", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == f"run {RUN}: died"


def test_an_unknown_run_is_named_with_what_is_meant(out: Path) -> None:
    with pytest.raises(
        ZooError, match=r"knows no run '20261126-010203-zoo-0002'; did you mean '20261126-010203-zoo-0001'"
    ):
        list(watching.watch(out, RUN[:-1] + "2"))
