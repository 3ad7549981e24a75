"""What follows what: the stages of jobs as pure decisions over results. No Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from workers.spec.job import ArtifactMade, Failure, Job, Manifest, Part, Stage, StageResult

NETWORK_STAGES = frozenset({Stage.FETCH, Stage.KEEP, Stage.PUBLISH})


@dataclass(frozen=True)
class Step:
    """One stage of one job, for one recipe where the stage is an artifact's own."""

    job: int
    stage: Stage
    recipe: str | None = None
    generation: int = 0
    part: Part | None = None


@dataclass
class ArtifactRun:
    """What is known of one artifact so far."""

    made: ArtifactMade | None = None
    manifest: Manifest | None = None
    commit: str | None = None
    failure: Failure | None = None
    seconds: dict[Stage, float] = field(default_factory=dict)
    host_bytes: int = 0
    device_bytes: int = 0
    attempts: int = 1
    elsewhere: bool = False
    keeping: bool = False  # it's on its way to the shared storage
    kept: bool = False  # the copy that has its verdict was begun

    @property
    def finished(self) -> bool:
        """Whether it's published, or never will be."""
        return (
            self.elsewhere
            or self.commit is not None
            or (self.manifest is not None and not self.manifest.verdict.accepted)
        )


class JobRun:
    """The state of one job: which steps are to be done next, and what came of those done."""

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
        """The step that a job begins with."""
        return self._step(Stage.FETCH)

    def restart(self) -> Step:
        """The first step again, on another node, for what isn't finished: published, or rejected.

        Steps that were given out before don't count any more.
        """
        self.generation += 1
        self._leave_out_finished()
        return self.first()

    def made_elsewhere(self, made: Mapping[str, tuple[Manifest, str | None]]) -> None:
        """Another driver has made these: manifest and commit, by recipe."""
        for name, (manifest, commit) in made.items():
            self.artifacts[name] = ArtifactRun(manifest=manifest, commit=commit, elsewhere=True)
        self._leave_out_finished()

    def _leave_out_finished(self) -> None:
        for artifact in self.artifacts.values():
            artifact.keeping = artifact.kept = False
        left = tuple(order for order in self.job.orders if not self.artifacts[order.recipe.name].finished)
        self.job = self.job.model_copy(update={"orders": left})

    def _step(self, stage: Stage, recipe: str | None = None) -> Step:
        return Step(self.index, stage, recipe, self.generation)

    def follow(self, step: Step, result: StageResult, attempts: int) -> list[Step]:
        """Take a step's final result in, and return the steps that it makes possible."""
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
        for made in result.artifacts:
            artifact = self.artifacts[made.recipe]
            artifact.made, artifact.failure = made, made.error
            artifact.manifest = None  # what a lost node said of its copy isn't this one's
            artifact.seconds[Stage.QUANTIZE] = made.seconds
            if made.error is None:
                yield self._step(Stage.VERIFY, made.recipe)
                if self.job.storage:
                    artifact.keeping = True
                    yield self._step(Stage.KEEP, made.recipe)

    def _after_verdict(self, recipe: str) -> Iterator[Step]:
        """Publish what's accepted; what stays here is kept with its verdict. One copy is made at a time."""
        artifact = self.artifacts[recipe]
        if artifact.keeping or artifact.manifest is None:
            return
        if artifact.manifest.verdict.accepted and self.job.destination:
            yield self._step(Stage.PUBLISH, recipe)
        elif self.job.storage and not artifact.kept:
            artifact.keeping = artifact.kept = True
            yield self._step(Stage.KEEP, recipe)

    def _after_keeping(self, step: Step, result: StageResult) -> Iterator[Step]:
        """A copy that fails costs nothing but safety, unless it's the one that stays."""
        artifact = self.artifacts[step.recipe or ""]
        artifact.keeping = False
        artifact.seconds[step.stage] = artifact.seconds.get(step.stage, 0.0) + result.seconds
        if not artifact.kept:
            yield from self._after_verdict(step.recipe or "")
        elif artifact.manifest and artifact.manifest.verdict.accepted:
            artifact.failure = result.failure
