"""What a person sees of a run at work."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan, make_plan
from pipeline.report import progress
from pipeline.report.board import Board, clock
from pipeline.report.progress import LiveProgress, PlainProgress
from pipeline.zoo import zoo as zoos
from tests.workers.jobs import ZOO
from workers.spec.job import Failure, Job, Stage, StageResult

TEXT = ZOO / "text"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    dataset = {"path": "text", "data_files": [str(TEXT / "heldout.txt")]}
    models = [{"id": str(ZOO / "models" / name)} for name in ("llama-tiny", "qwen3-moe-tiny")]
    raw = {"name": "p", "models": models, "recipes": ["bnb-nf4", "fp8-dynamic"], "verify": {"dataset": dataset}}
    made = make_plan(zoos.check(raw, "zoo"), tmp_path, tmp_path / "out", None)
    assert len(made.jobs) == 2
    return made


def result(stage: Stage, *, failure: str = "") -> StageResult:
    broken = Failure(kind="TransientError", message=failure) if failure else None
    return StageResult(stage=stage, failure=broken, node="n", seconds=2.0)


def test_the_board_counts_what_is_done_at_work_and_left(plan: Plan) -> None:
    board, (llama, moe) = Board(plan), plan.jobs
    quantize, verify = Step(0, Stage.QUANTIZE), Step(0, Stage.VERIFY, "bnb-nf4")
    assert board.header(0, 5) == "0 of 4 done, 0 at work, 5 s"
    board.started(llama, quantize, 1, 1.0)
    board.started(moe, quantize, 2, 3.0)
    assert list(board.rows(90)) == [
        ("llama-tiny 2 recipes", "quantizing", "89 s"),
        ("qwen3-moe-tiny 2 recipes", "quantizing, attempt 2", "87 s"),
    ]
    board.phases = {"quantize llama-tiny": "layer 2 of 4", "quantize another": "layer 1 of 9"}
    assert next(board.rows(90)) == ("llama-tiny 2 recipes", "quantizing, layer 2 of 4", "89 s")
    board.ended(llama, quantize, result(Stage.QUANTIZE), None)
    board.started(llama, verify, 1, 91)
    board.ended(llama, verify, result(Stage.VERIFY), None)
    header = board.header(0, 100)
    assert header.startswith("1 of 4 done, 1 at work, 1 min 40 s, about ")
    board.ended(moe, quantize, result(Stage.QUANTIZE, failure="away"), 5.0)
    assert "1 of 4 done, 0 at work" in board.header(0, 100), "it is tried again"
    board.ended(moe, quantize, result(Stage.QUANTIZE, failure="away"), None)
    assert board.header(0, 100).startswith("3 of 4 done, 2 failed or rejected")


def test_times_are_said_as_people_do() -> None:
    assert [clock(seconds) for seconds in (0.4, 89, 90, 3661, 5400, 90061)] == [
        "0 s", "89 s", "1 min 30 s", "61 min 01 s", "1 h 30 min", "25 h 01 min",
    ]  # fmt: skip


def test_a_plain_run_speaks_at_least_once_a_minute(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.2)
    said = io.StringIO()
    with PlainProgress(Console(file=said, width=200), plan) as plain:
        plain.started(plan.jobs[0], Step(0, Stage.QUANTIZE), 1)
        deadline = time.monotonic() + 10
        while said.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = said.getvalue().splitlines()
    assert "llama-tiny: quantizing" in lines[0]
    assert "0 of 4 done, 1 at work, 0 s: quantizing llama-tiny 2 recipes (0 s)" in lines[1]


def test_failures_stay_above_what_is_at_work(plan: Plan) -> None:
    said = io.StringIO()
    console = Console(file=said, width=80, height=24, force_terminal=True, color_system=None)
    with LiveProgress(console, plan) as live:
        live.started(plan.jobs[0], Step(0, Stage.QUANTIZE), 1)
        live.ended(plan.jobs[0], Step(0, Stage.QUANTIZE), 1, result(Stage.QUANTIZE, failure="no memory"), None)
        live.started(plan.jobs[1], Step(0, Stage.QUANTIZE), 1)
        time.sleep(0.5)
    text = said.getvalue()
    assert "llama-tiny: failed: no memory" in text
    assert "2 of 4 done, 2 failed or rejected, 1 at work" in text
    assert "qwen3-moe-tiny 2 recipes" in text


def test_a_fleet_that_fits_on_no_screen_is_cut_with_its_count(plan: Plan) -> None:
    said = io.StringIO()
    console = Console(file=said, width=80, height=14, force_terminal=True, color_system=None)
    with LiveProgress(console, plan) as live:
        for index in range(40):
            job: Job = plan.jobs[0]
            pin = job.model.model_copy(update={"id": f"org/model-{index}"})
            live.started(job.model_copy(update={"model": pin}), Step(0, Stage.QUANTIZE), 1)
        time.sleep(0.5)
    assert "model-0 2 recipes" in said.getvalue()
    assert "and 35 more" in said.getvalue()
