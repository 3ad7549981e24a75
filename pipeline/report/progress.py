"""Show a run's progress: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan
from workers.spec.job import Job, Stage, StageResult

DOING = {
    Stage.FETCH: "fetching",
    Stage.QUANTIZE: "quantizing",
    Stage.KEEP: "copying to storage",
    Stage.VERIFY: "verifying",
    Stage.PUBLISH: "publishing",
}


class PlainProgress:
    """Prints one line when a stage starts, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Print a line for a started stage."""
        suffix = f" (attempt {attempt})" if attempt > 1 else ""
        self._print(job, step, f"{DOING[step.stage]}{suffix}")

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Print a line with the result of a stage."""
        self._print(job, step, outcome(result, retry_in))
        for artifact in result.artifacts:
            artifact_outcome = (
                f"failed: {artifact.error.message}" if artifact.error else f"made, {artifact.bytes / 1e6:.1f} MB"
            )
            self._line(f"{Path(job.model.id).name} {artifact.recipe}", artifact_outcome)

    def _print(self, job: Job, step: Step, event: str) -> None:
        self._line(" ".join(filter(None, [Path(job.model.id).name, step.recipe])), event)

    def _line(self, subject: str, event: str) -> None:
        seconds = time.monotonic() - self._begun
        self._console.print(f"[{seconds:6.1f} s] {subject}: {event}", highlight=False, markup=False, soft_wrap=True)


class LiveProgress:
    """A table of all artifacts and their state, redrawn in place."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._states: dict[tuple[str, str], str] = {
            (cell.source.pin.id, cell.order.recipe.name): cell.reason for cell in plan.artifacts
        }
        self._begun = time.monotonic()
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Show the stage in the rows of the artifacts it is for."""
        self._set_state(job, step, DOING[step.stage] + (f", attempt {attempt}" if attempt > 1 else ""))

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Show the result in the rows of the artifacts it is for."""
        self._set_state(job, step, outcome(result, retry_in))
        for artifact in result.artifacts:
            self._states[job.model.id, artifact.recipe] = (
                f"failed: {artifact.error.message}" if artifact.error else "made"
            )

    def _set_state(self, job: Job, step: Step, state: str) -> None:
        for order in job.orders:
            if step.recipe in (None, order.recipe.name):
                self._states[job.model.id, order.recipe.name] = state

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("model", "recipe", "state"):
            table.add_column(column, no_wrap=column != "state")
        for (model, recipe), state in self._states.items():
            style = "red" if state.startswith(("failed", "rejected")) else "green" if "published" in state else ""
            table.add_row(Path(model).name, recipe, Text(state.splitlines()[0], style=style))
        return Group(table, Text(f"{time.monotonic() - self._begun:.0f} s", style="dim"))


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
