"""Show a run's progress: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan
from pipeline.report.board import DOING, Board
from workers.spec.job import Job, Stage, StageResult

# Seconds without a line after which a plain run says what it is at.
QUIET_SECONDS = 60.0
# Lines of the terminal that the header, the summary and the last events leave for what is at work.
ROOM, EVENTS = 6, 3


class _Shown:
    """What both displays have: the board that they show."""

    _board: Board

    def shows(self, phases: Mapping[str, str]) -> None:
        """Show what stages are at, by their labels, as it stands there at any time."""
        self._board.phases = phases


class PlainProgress(_Shown):
    """Prints a line when a stage starts, one when it ends, and at least one a minute."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._board = console, Board(plan)
        self._begun = self._spoke = time.monotonic()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Print a line for a started stage."""
        with self._lock:
            self._board.started(job, step, attempt, time.monotonic())
        suffix = f" (attempt {attempt})" if attempt > 1 else ""
        self._print(job, step, f"{DOING[step.stage]}{suffix}")

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Print a line with the result of a stage."""
        with self._lock:
            self._board.ended(job, step, result, retry_in)
        self._print(job, step, outcome(result, retry_in))
        for artifact in result.artifacts:
            artifact_outcome = (
                f"failed: {artifact.error.message}" if artifact.error else f"made, {artifact.bytes / 1e6:.1f} MB"
            )
            self._line(f"{Path(job.model.id).name} {artifact.recipe}: {artifact_outcome}")

    def _tick(self) -> None:
        while not self._over.wait(QUIET_SECONDS / 10):
            now = time.monotonic()
            if now - self._spoke >= QUIET_SECONDS:
                with self._lock:
                    rows, header = list(self._board.rows(now)), self._board.header(self._begun, now)
                running = "; ".join(f"{doing} {subject} ({took})" for subject, doing, took in rows[:ROOM])
                self._line(f"{header}{': ' if running else ''}{running}")

    def _print(self, job: Job, step: Step, event: str) -> None:
        self._line(f"{' '.join(filter(None, [Path(job.model.id).name, step.recipe]))}: {event}")

    def _line(self, text: str) -> None:
        self._spoke = time.monotonic()
        line = f"[{self._spoke - self._begun:6.1f} s] {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveProgress(_Shown):
    """What is at work, redrawn in place under a line that says how far the run is; failures stay above it."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._board = console, Board(plan)
        self._begun = time.monotonic()
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._live = Live(console=console, get_renderable=self._screen, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Show the stage among those at work."""
        self._board.started(job, step, attempt, time.monotonic())

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Show the result of a stage: for a while, or for good if it failed."""
        self._board.ended(job, step, result, retry_in)
        name = " ".join(filter(None, [Path(job.model.id).name, step.recipe]))
        said = outcome(result, retry_in)
        self._say(f"{name}: {said}", bad=said.startswith(("failed", "rejected")))
        for artifact in result.artifacts:
            if artifact.error:
                self._say(f"{Path(job.model.id).name} {artifact.recipe}: failed: {artifact.error.message}", bad=True)

    def _say(self, line: str, *, bad: bool) -> None:
        if bad:
            self._live.console.print(Text(line, style="red"))
        else:
            self._events.append(line)

    def _screen(self) -> Group:
        now, room = time.monotonic(), max(1, self._console.height - ROOM - EVENTS)
        rows = list(self._board.rows(now))
        table = Table(box=None, pad_edge=False, show_header=False)
        for column, wraps in (("of", False), ("doing", False), ("for", False)):
            table.add_column(column, no_wrap=not wraps, overflow="ellipsis")
        for subject, doing, took in rows[:room]:
            table.add_row(subject, doing, Text(took, style="dim"))
        parts: list[RenderableType] = [Text(self._board.header(self._begun, now), style="bold")]
        parts += [table] if rows else [Text("starting" if not self._board.done else "waiting", style="dim")]
        if len(rows) > room:
            parts.append(Text(f"and {len(rows) - room} more", style="dim"))
        parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._events]
        return Group(*parts)


def outcome(result: StageResult, retry_in: float | None) -> str:
    """A stage's result in a few words."""
    if result.failure:
        retry_note = f" (again in {retry_in:.0f} s)" if retry_in is not None else ""
        return f"failed: {result.failure.message}{retry_note}"
    took = f"{result.seconds:.1f} s"
    match result.stage:
        case Stage.VERIFY if result.manifest and result.manifest.verdict.metrics:
            verdict = result.manifest.verdict
            metrics = result.manifest.verdict.metrics
            verdict_text = "accepted" if verdict.accepted else f"rejected: {'; '.join(verdict.reasons)}"
            return f"{verdict_text}, KL {metrics.kl_mean:.3g}, top-1 {metrics.top1_agreement:.3f} ({took})"
        case Stage.VERIFY if result.manifest:
            return f"rejected: {'; '.join(result.manifest.verdict.reasons)} ({took})"
        case Stage.PUBLISH:
            return f"published as {(result.commit or '')[:12]} ({took})"
        case Stage.KEEP:
            return f"kept in storage ({took})"
        case Stage.FETCH:
            return f"fetched ({took})"
        case _:
            return f"quantized ({took})"
