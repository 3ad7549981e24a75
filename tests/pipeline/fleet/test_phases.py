"""What a stage is at gets from its process to the board."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.fleet import phases
from tests.pipeline.runs import ROOT
from workers.machine import phase


class FakeActor:
    """Calls of a desk without Ray."""

    def __init__(self) -> None:
        self.desk, self.heard = phases.Desk(), threading.Event()
        self.tell = self

    def remote(self, label: str, text: str) -> None:
        self.desk.tell(label, text)
        self.heard.set()


def test_a_process_tells_and_the_desk_forgets_it_when_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "EVERY_SECONDS", 0.01)
    actor = FakeActor()
    with phases.passed_on(actor, "quantize llama") as path:
        code = "from workers.machine.phase import tell; tell('layer 3 of 32')"
        environment = {**os.environ, phase.VARIABLE: path, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert actor.heard.wait(30)
        assert actor.desk.phases() == {"quantize llama": "layer 3 of 32"}
    assert actor.desk.phases() == {}
    assert not Path(path).parent.exists()


def test_a_desk_that_is_gone_ends_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "EVERY_SECONDS", 0.01)

    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("the actor died")

    with phases.passed_on(Gone(), "verify llama") as path:
        Path(path).write_text("layer 1 of 2")
        time.sleep(0.1)


def test_a_word_costs_nothing_where_nobody_asks_and_soon_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phase"
    monkeypatch.delenv(phase.VARIABLE, raising=False)
    phase.tell("nobody hears it")
    assert phase.told(path) == ""
    monkeypatch.setenv(phase.VARIABLE, str(path))
    for number in (1, 2):
        phase.tell(f"layer {number} of 2")
    assert phase.told(path) == "layer 1 of 2", "within half a second"
    monkeypatch.setenv(phase.VARIABLE, str(tmp_path / "gone" / "phase"))
    phase.tell("a folder that isn't there is no error")
