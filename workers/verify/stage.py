"""The verify stage: integrity, fidelity, runtime; then the card, and last of all the manifest."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from workers.checkpoint.source import Source
from workers.engines.table import layout_of
from workers.errors import CheckpointError, NumericalError, UserError
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.folded import Folded
from workers.machine.files import file_sha256, write_text
from workers.machine.preflight import versions
from workers.spec.families import Family, family_of
from workers.spec.job import (
    ArtifactMade,
    Calibration,
    FileEntry,
    Job,
    Manifest,
    Order,
    ReasonCode,
    Verdict,
    Verification,
)
from workers.spec.layers import kinds_of
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import MANIFEST, artifact_folder, folds_folder, record_path
from workers.transfer import hub
from workers.verify import gates, integrity
from workers.verify.card import render_card
from workers.verify.comparison import Comparison


def verify(job: Job, order: Order, source_folder: Path) -> Manifest:
    """Verify one artifact of a job and write its card and manifest; one that was verified before is judged again.

    Raises:
        QuantmillError: what isn't the artifact's fault: the source, the text, the device.
    """
    place = artifact_folder(job.workspace, order)
    made = ArtifactMade.model_validate_json(record_path(place).read_text())
    standing = _verified_before(place, job.verification)
    if standing is not None:
        verdict = _judged_again(standing.verdict, order)
        if verdict == standing.verdict and order.thresholds == standing.thresholds:
            return standing
    else:
        with Source(source_folder, allow_pickle=job.model.allow_pickle) as source:
            verdict = _verdict(job, order, source, place)
    if ReasonCode.INTEGRITY in verdict.codes:
        # Kept to be looked at, but what isn't whole is made anew by the next run.
        record_path(place).unlink()
    return _seal(job, order, place, source_folder, made, verdict)


def _verified_before(place: Path, verification: Verification) -> Manifest | None:
    """The manifest of exactly these bytes, measured on the same text, on which only the gates have to decide."""
    try:
        manifest = hub.check_bytes(place)
    except CheckpointError:
        manifest = None
    if (
        manifest
        and manifest.verification.same_as(verification)
        and all(code.by_threshold for code in manifest.verdict.codes)
    ):
        return manifest
    (place / MANIFEST).unlink(missing_ok=True)
    return None


def _judged_again(verdict: Verdict, order: Order) -> Verdict:
    """The same facts by the gates of now: a zoo may have changed them."""
    facts = gates.Evidence(
        metrics=verdict.metrics,
        runtime=verdict.runtime,
        worst_layers=verdict.worst_layers,
        generations=verdict.generations,
    )
    return gates.judge(facts, order.thresholds)


def _verdict(job: Job, order: Order, source: Source, place: Path) -> Verdict:
    """All facts about one artifact, and what the gates say of them."""
    comparison = Comparison.of_job(job, source)
    comparison.load()
    try:
        with open_decoded(place, trust_remote_code=job.model.trust_remote_code) as artifact:
            return gates.judge(_facts(order, comparison, place, artifact), order.thresholds)
    except (UserError, NumericalError) as error:
        # The source was read before: what can't be read now is the artifact.
        return gates.judge(gates.Evidence(integrity=[f"integrity: {error}"]), order.thresholds)


def _facts(order: Order, comparison: Comparison, place: Path, artifact: Source | Decoded) -> gates.Evidence:
    """What isn't whole is not measured: it's made anew, and its numbers would say nothing."""
    intended = frozenset(layout_of(place, order.recipe, comparison.reference).modules)
    meant = Folded(comparison.source, folds_folder(place), comparison.transposed)
    found = integrity.inspect(meant, artifact, place, intended)
    if found.problems:
        return gates.Evidence(integrity=found.problems, worst_layers=found.worst)
    return comparison.measure(place, artifact, found)


Described = TypeVar("Described", Calibration, Verification)


def _public(described: Described) -> Described:
    """The same without the paths of this machine: data files by their names."""
    dataset = described.dataset
    names = tuple(Path(name).name for name in dataset.data_files)
    path = Path(dataset.path).name if Path(dataset.path).is_absolute() else dataset.path
    return described.model_copy(update={"dataset": dataset.model_copy(update={"data_files": names, "path": path})})


def _seal(job: Job, order: Order, place: Path, source_folder: Path, made: ArtifactMade, verdict: Verdict) -> Manifest:
    """Write the card, then the manifest over all files: from here on the artifact is these very bytes."""
    (place / MANIFEST).unlink(missing_ok=True)
    environment = versions()
    with Source(source_folder, allow_pickle=job.model.allow_pickle) as source:
        reference_bytes = source.bytes
        kinds = kinds_of(order.recipe, _headers(source), conv1d=_family(source_folder).conv1d)
    card = render_card(job, order, source_folder, verdict, environment, made.fallbacks, kinds)
    write_text(place / "README.md", card)
    files = {
        str(path.relative_to(place)): FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    manifest = Manifest(
        fingerprint=order.fingerprint,
        model=job.model.id,
        revision=job.model.revision,
        recipe=order.recipe,
        calibration=_public(job.calibration) if job.calibration and order.recipe.calibrated else None,
        verification=_public(job.verification),
        thresholds=order.thresholds,
        files=files,
        verdict=verdict,
        environment=environment,
        fallbacks=made.fallbacks,
        bytes=made.bytes,
        reference_bytes=reference_bytes,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_text(place / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _headers(source: Source) -> list[TensorHeader]:
    return [TensorHeader(name, tuple(header.shape), "") for name, header in source.headers.items()]


def _family(folder: Path) -> Family:
    return family_of(json.loads((folder / "config.json").read_text()).get("model_type"))
