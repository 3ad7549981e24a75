"""The driver, a real process for the stage that computes, and a limit that its first attempt breaks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.steps import Step
from tests.pipeline.simulated import SimulatedFleet, Told, node, plan_of, size
from workers.machine import child
from workers.machine.failures import of_a_process
from workers.spec.job import Failure, Job, Stage, StageResult


def stage(request: str) -> str:
    """Take memory as a pass does: 800 MB, or 50 MB in the smallest micro-batches."""
    asked = json.loads(request)
    if not asked["lean"] and asked["events"]:
        Path(asked["events"]).write_text("oom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)
    held = bytearray((50 if asked["lean"] else 800) * 10**6)
    held[::4096] = b"x" * len(held[::4096])
    return json.dumps(len(held))


class OneProcess(SimulatedFleet):
    """Quantizes in a fresh process, as ``pipeline.fleet.cluster.compute`` does; its end becomes the stage's result."""

    def __init__(self, events: Path | None) -> None:
        super().__init__([node("a")])
        self.asked: list[str] = []
        self._file = str(events) if events else None

    def _result(self, step: Step, of: Job, node: Node, claim: Claim) -> StageResult:
        if step.stage == Stage.QUANTIZE:
            self.asked.append("lean" if claim.alone else "full")
            request = json.dumps({"lean": claim.alone, "events": self._file})
            ended = child.run("tests.workers.memory_run:stage", request)
            if ended.answer is None:
                error = of_a_process(step.stage, ended)
                failure = Failure(kind=type(error).__name__, message=str(error))
                return StageResult(stage=step.stage, failure=failure)
        return super()._result(step, of, node, claim)


def smaller_retry(events: Path | None = None) -> dict[str, Any]:
    """What came of a run of one artifact."""
    fleet, told = OneProcess(events), Told()
    driver = Driver(fleet, plan_of([size(1)], "bnb-nf4"), [told])
    driver.run()
    (artifact,) = driver.jobs[0].artifacts.values()
    return {"asked": fleet.asked, "failures": told.failures, "statuses": ["published" if artifact.commit else "failed"]}
