"""What is known of a run at work: what runs since when, what is done, and how long the rest may take. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan
from workers.spec.job import Job, Stage, StageResult, stage_label

DOING = {
    Stage.FETCH: "fetching",
    Stage.QUANTIZE: "quantizing",
    Stage.KEEP: "copying to storage",
    Stage.VERIFY: "verifying",
    Stage.PUBLISH: "publishing",
}
# The least share of the work that has to be done before the rest is estimated from it.
TELLING = 0.02
Key = tuple[str, str]


@dataclass
class AtWork:
    """A stage that runs: of what, its label, which, since when (seconds), and in which attempt."""

    subject: str
    label: str
    doing: str
    since: float
    attempt: int


@dataclass
class Board:
    """The state of a run; times are seconds of any one clock."""

    plan: Plan
    phases: Mapping[str, str] = field(default_factory=dict)  # what stages are at, by their labels
    at_work: dict[tuple[str, Step], AtWork] = field(default_factory=dict)
    waiting: dict[Key, str] = field(default_factory=dict)  # artifacts that are tried again, and when
    done: dict[Key, str] = field(default_factory=dict)  # artifact -> made, failed or rejected
    last: dict[Key, Stage] = field(default_factory=dict)  # the last stage of each artifact

    def __post_init__(self) -> None:
        publishes = any(job.destination is not None for job in self.plan.jobs)
        final = Stage.PUBLISH if publishes else Stage.VERIFY
        self.last = {(job.model.id, order.recipe.name): final for job in self.plan.jobs for order in job.orders}
        self._work = {
            (cell.source.pin.id, cell.order.recipe.name): max(1, cell.estimate.own_work + cell.estimate.pass_work)
            for cell in self.plan.artifacts
        }

    def started(self, job: Job, step: Step, attempt: int, now: float) -> None:
        """A stage was handed to a node."""
        of = step.recipe or (job.orders[0].recipe.name if len(job.orders) == 1 else f"{len(job.orders)} recipes")
        label = stage_label(step.stage, step.part, job.model, step.recipe)
        subject = f"{Path(job.model.id).name} {of}"
        self.at_work[job.model.id, step] = AtWork(subject, label, DOING[step.stage], now, attempt)

    def ended(self, job: Job, step: Step, result: StageResult, retry_in: float | None) -> None:
        """A stage ended, or failed; ``retry_in`` seconds from now it's tried again."""
        self.at_work.pop((job.model.id, step), None)
        keys = [(job.model.id, order.recipe.name) for order in job.orders if step.recipe in (None, order.recipe.name)]
        if result.failure is not None:
            if retry_in is None:
                self.done |= dict.fromkeys(keys, "failed")
            return
        for artifact in result.artifacts:
            if artifact.error is not None:
                self.done[job.model.id, artifact.recipe] = "failed"
        for key in keys:
            if step.stage is Stage.VERIFY and result.manifest and not result.manifest.verdict.accepted:
                self.done[key] = "rejected"
            elif step.stage is self.last.get(key) and key not in self.done:
                self.done[key] = "made"

    def header(self, begun: float, now: float) -> str:
        """How far it is, in one line."""
        total, failed = len(self.last), sum(state != "made" for state in self.done.values())
        parts = [f"{len(self.done)} of {total} done", *([f"{failed} failed or rejected"] if failed else [])]
        parts += [f"{len(self.at_work)} at work", f"{clock(now - begun)}"]
        left = self.seconds_left(now - begun)
        return ", ".join([*parts, *([f"about {clock(left)} left"] if left is not None else [])])

    def seconds_left(self, elapsed: float) -> float | None:
        """What the rest takes at the pace so far; None while too little is done to tell."""
        total = sum(self._work.get(key, 1) for key in self.last)
        done = sum(self._work.get(key, 1) for key in self.done if key in self.last)
        return elapsed * (total - done) / done if total and done / total >= TELLING and done < total else None

    def rows(self, now: float) -> Iterator[tuple[str, str, str]]:
        """What is at work, the longest first: of what, doing what, for how long."""
        for one in sorted(self.at_work.values(), key=lambda one: one.since):
            again = f", attempt {one.attempt}" if one.attempt > 1 else ""
            at = f", {self.phases[one.label]}" if one.label in self.phases else ""
            yield one.subject, f"{one.doing}{at}{again}", clock(now - one.since)


def clock(seconds: float) -> str:
    """A time span as people say it."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
