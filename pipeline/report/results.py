"""Build ``results.json``. Tools rely on its field names; docs/results.md has the contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from pipeline.fleet.steps import ArtifactRun, JobRun
from pipeline.planning.cells import RefusedArtifact
from pipeline.planning.plan import PlannedArtifact
from workers.spec.base import Frozen
from workers.spec.data import Calibration
from workers.spec.job import ExpertTokens, Generation, Manifest, Outcome, PeakMemory, Stage
from workers.spec.workspace import artifact_folder

# Of results.json; changes when a name gets another meaning, or goes. New names come without a new version.
SCHEMA_VERSION: Literal[1] = 1
# ``error.kind`` of a run that a signal ended.
INTERRUPTED = "Interrupted"
Status = Literal["published", "verified", "skipped", "rejected", "failed"]


class Seconds(Frozen):
    """Wall-clock seconds of each stage."""

    fetch: float = 0.0
    quantize: float = 0.0
    keep: float = 0.0
    verify: float = 0.0
    publish: float = 0.0


class JobEntry(Frozen):
    """One job of the run."""

    model: str
    revision: str
    recipes: tuple[str, ...]
    node: str
    seconds: Seconds


class MetricsEntry(Frozen):
    """Fidelity on held-out text; KL in nats for each token."""

    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    eval_tokens: int


class RuntimeEntry(Frozen):
    """The library that loaded the artifact, and the largest difference between its logits and ours."""

    name: str
    version: str
    max_abs_logit_difference: float


class CheckEntry(Frozen):
    """A library that loaded the artifact: on which processor, and how far its check went."""

    name: str
    version: str
    processor: str
    verdict: str
    relative_logit_difference: float
    kl_mean: float | None


class ErrorEntry(Frozen):
    """Why an artifact failed."""

    kind: str
    message: str


class ArtifactEntry(Frozen):
    """One artifact of the run."""

    model: str
    revision: str
    recipe: str
    fingerprint: str
    status: Status
    reason: str | None
    path: str | None
    repo_id: str | None
    commit: str | None
    metrics: MetricsEntry | None
    runtime: RuntimeEntry | None
    bytes: int
    reference_bytes: int
    seconds: Seconds
    peak_memory_bytes: PeakMemory
    fallbacks: tuple[str, ...]
    attempts: int
    error: ErrorEntry | None
    outcome: Outcome | None = None
    worst_layers: tuple[tuple[str, float], ...] = ()
    generations: tuple[Generation, ...] = ()
    runtimes: tuple[CheckEntry, ...] = ()
    layer_noise: tuple[float | None, ...] = Field(
        (), description="Lowest SQNR in dB of each layer's quantized weights, by number."
    )
    expert_tokens: tuple[ExpertTokens, ...] = Field(
        (), description="Calibration tokens that came to each layer's experts: least, median and most."
    )


class Results(Frozen):
    """The whole run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    zoo: str
    started_at: str
    finished_at: str
    status: Literal["ok", "failed"]
    jobs: tuple[JobEntry, ...]
    artifacts: tuple[ArtifactEntry, ...]
    error: ErrorEntry | None = None
    calibration: str | None = Field(None, description="What calibrated recipes learned from: data sets and tokens.")


def build(
    run_id: str,
    zoo: str,
    started_at: str,
    finished_at: str,
    planned: Iterable[PlannedArtifact],
    jobs: list[JobRun],
    refused: Iterable[RefusedArtifact] = (),
    ended: ErrorEntry | None = None,
    calibration: Calibration | None = None,
) -> Results:
    """Build the results of a run; every cell of the zoo has an entry, even if refused, skipped or never started.

    ``ended``: what ended the run before all artifacts were finished. ``calibration``: the zoo's.
    """
    runs = {(job.job.model.id, name): (job, artifact) for job in jobs for name, artifact in job.artifacts.items()}
    entries = (
        *(_refused(cell) for cell in refused),
        *(_artifact(cell, *runs.get(_key(cell), (None, None)), ended=ended) for cell in planned),
    )
    failed = ended is not None or any(entry.status in ("failed", "rejected") for entry in entries)
    return Results(
        run_id=run_id,
        zoo=zoo,
        started_at=started_at,
        finished_at=finished_at,
        status="failed" if failed else "ok",
        jobs=tuple(_job(job) for job in jobs),
        artifacts=entries,
        error=ended,
        calibration=calibration.described if calibration else None,
    )


def _key(cell: PlannedArtifact) -> tuple[str, str]:
    return cell.source.pin.id, cell.order.recipe.name


def _refused(cell: RefusedArtifact) -> ArtifactEntry:
    return ArtifactEntry(
        model=cell.model,
        revision=cell.revision,
        recipe=cell.recipe,
        fingerprint="",
        status="failed",
        reason=" ".join(cell.failure.message.split()),
        path=None,
        repo_id=cell.repo_id,
        commit=None,
        metrics=None,
        runtime=None,
        bytes=0,
        reference_bytes=0,
        seconds=Seconds(),
        peak_memory_bytes=PeakMemory(),
        fallbacks=(),
        attempts=0,
        error=ErrorEntry(kind=cell.failure.kind, message=cell.failure.message),
    )


def _job(job: JobRun) -> JobEntry:
    return JobEntry(
        model=job.job.model.id,
        revision=job.job.model.revision,
        recipes=tuple(job.artifacts),
        node=job.host,
        seconds=_seconds(job.seconds),
    )


def _seconds(by_stage: dict[Stage, float]) -> Seconds:
    return Seconds(**{stage.value: round(seconds, 3) for stage, seconds in by_stage.items()})


def _artifact(
    cell: PlannedArtifact, job: JobRun | None, run: ArtifactRun | None, *, ended: ErrorEntry | None
) -> ArtifactEntry:
    run = run or ArtifactRun()
    manifest = cell.standing or run.manifest
    status, reason = _status(cell, job, run, ended)
    path = artifact_folder(job.job.workspace, cell.order) if job else None
    record = run.record
    return ArtifactEntry(
        model=cell.source.pin.id,
        revision=cell.source.pin.revision,
        recipe=cell.order.recipe.name,
        fingerprint=cell.order.fingerprint,
        status=status,
        reason=reason,
        path=str(path) if path and path.is_dir() else None,
        repo_id=cell.order.repo_id,
        commit=run.commit or cell.commit,
        metrics=_metrics(manifest),
        runtime=_runtime(manifest),
        bytes=manifest.bytes if manifest else record.bytes if record else 0,
        reference_bytes=manifest.reference_bytes if manifest else (job.reference_bytes if job else 0),
        seconds=_seconds(run.seconds),
        peak_memory_bytes=PeakMemory(host=run.host_bytes, device=run.device_bytes),
        fallbacks=manifest.fallbacks if manifest else record.fallbacks if record else (),
        attempts=run.attempts if job else 0,
        error=ErrorEntry(kind=run.failure.kind, message=run.failure.message) if run.failure else None,
        outcome=manifest.verdict.outcome if manifest else None,
        worst_layers=manifest.verdict.worst_layers if manifest else (),
        generations=manifest.verdict.generations if manifest else (),
        runtimes=_checks(manifest),
        layer_noise=manifest.verdict.layer_noise if manifest else (),
        expert_tokens=manifest.expert_tokens if manifest else record.expert_tokens if record else (),
    )


def _status(
    cell: PlannedArtifact, job: JobRun | None, run: ArtifactRun, ended: ErrorEntry | None
) -> tuple[Status, str | None]:
    if cell.skipped:
        return "skipped", cell.reason
    if run.elsewhere:
        return "skipped", "made by another run meanwhile"
    if run.failure is not None:
        return "failed", " ".join(run.failure.message.split())
    if run.manifest is not None and not run.manifest.verdict.accepted:
        verdict = run.manifest.verdict
        return "rejected", f"{verdict.outcome}: {'; '.join(verdict.reasons)}"
    if run.commit is not None:
        return "published", None
    if run.manifest is not None and (job is None or job.job.destination is None):
        return "verified", None
    if ended is not None and ended.kind != INTERRUPTED:
        return "failed", f"not finished, for the run ended ({ended.message.rstrip('.')}); run the zoo again to go on"
    return "failed", "interrupted before it was finished; run the zoo again to go on"


def _metrics(manifest: Manifest | None) -> MetricsEntry | None:
    if manifest is None or manifest.verdict.metrics is None:
        return None
    fields = set(MetricsEntry.model_fields)
    return MetricsEntry.model_validate(manifest.verdict.metrics.model_dump(include=fields))


def _runtime(manifest: Manifest | None) -> RuntimeEntry | None:
    if manifest is None or manifest.verdict.runtime is None:
        return None
    fields = set(RuntimeEntry.model_fields)
    return RuntimeEntry.model_validate(manifest.verdict.runtime.model_dump(include=fields))


def _checks(manifest: Manifest | None) -> tuple[CheckEntry, ...]:
    if manifest is None:
        return ()
    fields = CheckEntry.model_fields
    return tuple(CheckEntry(**{name: getattr(found, name) for name in fields}) for found in manifest.verdict.runtimes)
