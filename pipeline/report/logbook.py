"""Write a run's machine-readable log: one JSON line for each stage that starts or ends, and for what ended the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from pipeline.fleet.steps import Step
from pipeline.report.ledger import now
from workers.spec.job import Job, StageResult

LOG = "log.jsonl"


class Logbook:
    """Writes ``log.jsonl`` in a run's folder; lines are flushed one by one, so that a killed run leaves whole lines."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._run_id = run_id
        self._file: TextIO = (folder / LOG).open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Log that a stage was handed to a node."""
        self._write("started", job, step, attempt)

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Log that a stage ended or failed."""
        failure, verdict = result.failure, result.manifest.verdict if result.manifest else None
        self._write(
            "failed" if failure else "ended",
            job,
            step,
            attempt,
            node=result.node,
            seconds=round(result.seconds, 3),
            host_bytes=result.memory.host,
            device_bytes=result.memory.device,
            outcome=verdict.outcome.value if verdict else None,
            reasons=list(verdict.reasons) if verdict and verdict.reasons else None,
            commit=result.commit,
            error=f"{failure.kind}: {failure.message}" if failure else None,
            traceback=(failure.traceback or None) if failure else None,
            failed=[
                {
                    "recipe": made.recipe,
                    "error": f"{made.error.kind}: {made.error.message}",
                    "traceback": made.error.traceback,
                }
                for made in result.artifacts
                if made.error
            ]
            or None,
            retry_in=retry_in,
            notes=list(result.notes) or None,
        )

    def over(self, kind: str, message: str, traceback: str | None) -> None:
        """Log that something other than a stage ended the run, and what."""
        line = {"time": now(), "run": self._run_id, "event": "over", "error": f"{kind}: {message}"}
        self._put({**line, **({"traceback": traceback} if traceback else {})})

    def _write(self, event: str, job: Job, step: Step, attempt: int, **fields: Any) -> None:
        line = {
            "time": now(),
            "run": self._run_id,
            "event": event,
            "model": job.model.id,
            "revision": job.model.revision,
            "recipe": step.recipe,
            "stage": step.stage.value,
            "attempt": attempt,
            **{key: value for key, value in fields.items() if value is not None},
        }
        self._put(line)

    def _put(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
