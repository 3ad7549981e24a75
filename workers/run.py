"""Runs one stage of a job in this process, and always returns a result. The only entry point to the workers.

Imports no torch until a stage needs it: fetch and publish never do.
"""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from pathlib import Path

from workers.errors import CheckpointError, QuantmillError
from workers.machine.deadline import ends_within
from workers.machine.failures import describe, peak_memory
from workers.machine.files import checkpoint_sha256, open_checkpoint
from workers.spec.base import Frozen
from workers.spec.job import Job, ModelPin, Part, PeakMemory, Stage, StageResult, stage_label
from workers.spec.workspace import artifact_folder, is_made
from workers.transfer import destinations, from_hub, hub
from workers.transfer.pace import LocalPace, Pace
from workers.transfer.storage import Storage


class StageRequest(Frozen):
    """A request to run one stage of a job; after ``seconds`` the stage counts as hanging."""

    job: Job
    stage: Stage
    recipe: str | None = None
    part: Part | None = None
    seconds: float


def answer(request: str) -> str:
    """A ``StageResult`` for a ``StageRequest``, both as JSON: a stage in its own process, with its own pace."""
    parsed = StageRequest.model_validate_json(request)
    return run_stage(
        parsed.job, parsed.stage, parsed.recipe, seconds=parsed.seconds, part=parsed.part
    ).model_dump_json()


def run_stage(
    job: Job,
    stage: Stage,
    recipe: str | None = None,
    pace: Pace | None = None,
    *,
    seconds: float = math.inf,
    part: Part | None = None,
) -> StageResult:
    """Run a stage; ``recipe`` names the artifact for verify and publish. Errors are returned as ``failure``.

    ``part`` selects the part of a quantize stage that is spread over workers; the last, ``join``, returns artifacts.

    ``pace`` is shared by all processes of the run; None: this process has its own. After ``seconds`` the stage counts
    as hanging, and is ended.
    """
    start = time.monotonic()
    try:
        with ends_within(seconds, stage_label(stage, part, job.model, recipe)):
            if part is not None:
                assert stage is Stage.QUANTIZE
                result = _quantize_part(job, part)
            else:
                result = _STAGES[stage](job, recipe, pace or pace_of(job))
    except Exception as error:
        result = StageResult(stage=stage, recipe=recipe, failure=describe(error))
    peak = peak_memory()
    memory = PeakMemory(host=peak.host + result.memory.host, device=peak.device)
    return result.model_copy(update={"node": platform.node(), "seconds": time.monotonic() - start, "memory": memory})


def pace_of(job: Job) -> Pace:
    """A pace for this process alone, within the limits of the job's destination."""
    return LocalPace(job.destination.limits if job.destination else None)


def _fetch(job: Job, recipe: str | None, pace: Pace) -> StageResult:
    model = job.model
    if model.folder is None:
        api = hub.connect(model.endpoint, pace)
        from_hub.fetch(api, model.id, model.revision, model.allow_pickle, variant=model.variant)
    elif _revision(model, Path(model.folder)) != model.revision:
        raise CheckpointError(f"models: {model.id!r} changed since it was planned; run the zoo again")
    texts = {"verify.dataset": job.verification.dataset}
    if job.verification.shown is not None:
        texts["verify.shown"] = job.verification.shown
    if (calibration := job.calibration) is not None:
        texts |= {calibration.where(index): text for index, text in enumerate(calibration.datasets)}
    for where, text in texts.items():
        if text.revision is not None:  # pinned to a commit of the Hub by the plan
            from workers.model.rows import fetch_dataset

            fetch_dataset(text, where)
    if job.storage is not None:
        storage = Storage(job.storage)
        for order in job.orders:
            if not is_made(folder := artifact_folder(job.workspace, order)):
                storage.restore(folder)
    return StageResult(stage=Stage.FETCH)


def _revision(model: ModelPin, folder: Path) -> str:
    files = open_checkpoint(folder, f"models: {model.id!r}", variant=model.variant, allow_pickle=model.allow_pickle)
    return checkpoint_sha256(folder, files)


def _quantize(job: Job, recipe: str | None, pace: Pace) -> StageResult:
    from workers.quantize.one_pass import quantize

    artifacts, reference_bytes = quantize(job, model_folder(job))
    return StageResult(stage=Stage.QUANTIZE, artifacts=artifacts, reference_bytes=reference_bytes)


def _quantize_part(job: Job, part: Part) -> StageResult:
    from workers.quantize import spread

    folder = model_folder(job)
    match part.step:
        case "gather":
            spread.gather(job, folder, part.index, part.of)
        case "solve":
            spread.solve(job, folder, part.index, part.of)
        case "join":
            artifacts, reference_bytes = spread.join(job, folder, part.of)
            return StageResult(stage=Stage.QUANTIZE, artifacts=artifacts, reference_bytes=reference_bytes)
    return StageResult(stage=Stage.QUANTIZE)


def _keep(job: Job, recipe: str | None, pace: Pace) -> StageResult:
    assert recipe is not None
    assert job.storage is not None
    Storage(job.storage).keep(artifact_folder(job.workspace, job.order(recipe)))
    return StageResult(stage=Stage.KEEP, recipe=recipe)


def _verify(job: Job, recipe: str | None, pace: Pace) -> StageResult:
    from workers.verify.stage import verify

    assert recipe is not None
    manifest = verify(job, job.order(recipe), model_folder(job))
    # The processes that loaded the source and, later, the artifact ran at the same time as this one.
    loaders = (manifest.source_check, *manifest.verdict.runtimes)
    loader = PeakMemory(host=max((found.host_bytes for found in loaders if found), default=0))
    return StageResult(stage=Stage.VERIFY, recipe=recipe, manifest=manifest, memory=loader)


def _publish(job: Job, recipe: str | None, pace: Pace) -> StageResult:
    assert recipe is not None
    order, destination = job.order(recipe), job.destination
    assert destination is not None
    assert order.repo_id is not None
    folder = artifact_folder(job.workspace, order)
    to = destination.model_copy(update={"gather": order.gathered})
    commit = destinations.publish(to, order.repo_id, folder, pace)
    if job.storage is not None:
        with suppress(QuantmillError):  # already published: a leftover copy does no harm
            Storage(job.storage).remove(folder)
    return StageResult(stage=Stage.PUBLISH, recipe=recipe, commit=commit)


def model_folder(job: Job) -> Path:
    """The folder of a job's model, which must have been fetched."""
    model = job.model
    if model.folder is not None:
        return Path(model.folder)
    return from_hub.fetch(hub.connect(model.endpoint), model.id, model.revision, model.allow_pickle, offline=True)


_STAGES = {
    Stage.FETCH: _fetch,
    Stage.QUANTIZE: _quantize,
    Stage.KEEP: _keep,
    Stage.VERIFY: _verify,
    Stage.PUBLISH: _publish,
}
