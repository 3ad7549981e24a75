"""Decide which stages of a job follow which results. Pure: no Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from workers.spec.job import ArtifactMade, Failure, Job, Manifest, Part, Stage, StageResult

NETWORK_STAGES = frozenset({Stage.FETCH, Stage.KEEP, Stage.PUBLISH})


@dataclass(frozen=True)
class Step:
    """One stage of one job; ``recipe`` is set for the stages of a single artifact (verify, keep, publish)."""

    job: int
    stage: Stage
    recipe: str | None = None
    generation: int = 0
    part: Part | None = None


@dataclass
class ArtifactRun:
    """State of one artifact so far."""

    record: ArtifactMade | None = None  # from the quantize stage
    manifest: Manifest | None = None
    commit: str | None = None
    failure: Failure | None = None
    seconds: dict[Stage, float] = field(default_factory=dict)
    host_bytes: int = 0
    device_bytes: int = 0
    attempts: int = 1
    elsewhere: bool = False
    keeping: bool = False  # a copy to the shared storage is in progress
    final_copy_begun: bool = False  # of the copy that includes the verdict

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: it is published, rejected, or made by another driver."""
        return (
            self.elsewhere
            or self.commit is not None
            or (self.manifest is not None and not self.manifest.verdict.accepted)
        )


class JobRun:
    """State of one job: the steps to do next, and the results of those done."""

    def __init__(self, index: int, job: Job) -> None:
        self.index = index
        self.job = job
        self.node = ""
        self.generation = 0
        self.host = ""
        self.reference_bytes = 0
        self.seconds: dict[Stage, float] = {}
        self.artifacts = {order.recipe.name: ArtifactRun() for order in job.orders}

    def first(self) -> Step:
        """The first step of a job."""
        return self._step(Stage.FETCH)

    def restart(self) -> Step:
        """Restart on another node with the unfinished artifacts (not published, not rejected); returns the first step.

        Steps of earlier generations are ignored from now on.
        """
        self.generation += 1
        self._leave_out_finished()
        return self.first()

    def leave_out(self, recipe: str, failure: Failure) -> Step:
        """Record that a recipe can't be made, and leave it out of the job; returns the step that would have made it."""
        self.artifacts[recipe].failure = failure
        left = tuple(order for order in self.job.orders if order.recipe.name != recipe)
        self.job = self.job.model_copy(update={"orders": left})
        return self._step(Stage.QUANTIZE, recipe)

    def made_elsewhere(self, artifacts: Mapping[str, tuple[Manifest, str | None]]) -> None:
        """Record artifacts that another driver has made: manifest and commit, by recipe."""
        for name, (manifest, commit) in artifacts.items():
            self.artifacts[name] = ArtifactRun(manifest=manifest, commit=commit, elsewhere=True)
        self._leave_out_finished()

    def _leave_out_finished(self) -> None:
        for artifact in self.artifacts.values():
            artifact.keeping = artifact.final_copy_begun = False
        left = tuple(order for order in self.job.orders if not self.artifacts[order.recipe.name].finished)
        self.job = self.job.model_copy(update={"orders": left})

    def _step(self, stage: Stage, recipe: str | None = None) -> Step:
        return Step(self.index, stage, recipe, self.generation)

    def follow(self, step: Step, result: StageResult, attempts: int) -> list[Step]:
        """Record a step's final result, and return the steps that can start now."""
        self.seconds[step.stage] = self.seconds.get(step.stage, 0.0) + result.seconds
        self.reference_bytes = result.reference_bytes or self.reference_bytes
        self.host = result.node or self.host
        if step.stage is Stage.KEEP:
            return list(self._after_keeping(step, result))
        for _, artifact in self._touched(step):
            artifact.attempts = max(artifact.attempts, attempts)
            artifact.host_bytes = max(artifact.host_bytes, result.memory.host)
            artifact.device_bytes = max(artifact.device_bytes, result.memory.device)
            artifact.seconds[step.stage] = result.seconds
            artifact.failure = result.failure
        return [] if result.failure else list(self._next(step, result))

    def _touched(self, step: Step) -> list[tuple[str, ArtifactRun]]:
        names = [order.recipe.name for order in self.job.orders]
        return [(name, self.artifacts[name]) for name in names if step.recipe in (None, name)]

    def _next(self, step: Step, result: StageResult) -> Iterator[Step]:
        match step.stage:
            case Stage.FETCH:
                yield self._step(Stage.QUANTIZE)
            case Stage.QUANTIZE:
                yield from self._verify_what_was_made(result)
            case Stage.VERIFY:
                artifact = self.artifacts[step.recipe or ""]
                artifact.manifest = result.manifest
                yield from self._after_verdict(step.recipe or "")
            case Stage.PUBLISH:
                self.artifacts[step.recipe or ""].commit = result.commit

    def _verify_what_was_made(self, result: StageResult) -> Iterator[Step]:
        for record in result.artifacts:
            artifact = self.artifacts[record.recipe]
            artifact.record, artifact.failure = record, record.error
            artifact.manifest = None  # a manifest from a lost node describes its copy, not this one
            artifact.seconds[Stage.QUANTIZE] = record.seconds
            if record.error is None:
                yield self._step(Stage.VERIFY, record.recipe)
                if self.job.storage:
                    artifact.keeping = True
                    yield self._step(Stage.KEEP, record.recipe)

    def _after_verdict(self, recipe: str) -> Iterator[Step]:
        """Publish an accepted artifact; copy others to storage, with their verdict. One copy runs at a time."""
        artifact = self.artifacts[recipe]
        if artifact.keeping or artifact.manifest is None:
            return
        if artifact.manifest.verdict.accepted and self.job.destination:
            yield self._step(Stage.PUBLISH, recipe)
        elif self.job.storage and not artifact.final_copy_begun:
            artifact.keeping = artifact.final_copy_begun = True
            yield self._step(Stage.KEEP, recipe)

    def _after_keeping(self, step: Step, result: StageResult) -> Iterator[Step]:
        """Go on after a copy. Only the failure of the final copy is an artifact's failure; earlier ones are backups."""
        artifact = self.artifacts[step.recipe or ""]
        artifact.keeping = False
        artifact.seconds[step.stage] = artifact.seconds.get(step.stage, 0.0) + result.seconds
        if not artifact.final_copy_begun:
            yield from self._after_verdict(step.recipe or "")
        elif artifact.manifest and artifact.manifest.verdict.accepted:
            artifact.failure = result.failure
