"""The verify stage: checks integrity, fidelity and runtime, then writes the card and, last, the manifest."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from workers.checkpoint.source import ModelSource, Source
from workers.engines.table import layout_of
from workers.errors import CheckpointError, NumericalError, UserError
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.folded import Folded
from workers.formats.kept import KeptSource, open_source
from workers.machine.files import file_sha256, write_text
from workers.machine.preflight import versions
from workers.model.device import compute_device
from workers.model.loading import read_config
from workers.model.text import has_chat_template
from workers.spec.auto_classes import is_multimodal, loader_of
from workers.spec.data import Verification
from workers.spec.families import family_of
from workers.spec.formats import FORMATS
from workers.spec.job import ArtifactMade, FileEntry, Job, Manifest, Order, ReasonCode, SourceCheck, Verdict
from workers.spec.layers import kinds_of
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import CHART, MANIFEST, artifact_folder, folds_folder, record_path
from workers.transfer import charts, hub
from workers.verify import gates, integrity, picture, undecoded
from workers.verify.card import render_card
from workers.verify.card_body import Told
from workers.verify.comparison import Comparison


class Circumstances(NamedTuple):
    """How an artifact was compared: the check of its source, special tokens of the sequences, and what was left out."""

    source_check: SourceCheck | None
    begin_with: tuple[str, ...] | None
    notes: tuple[str, ...]


def verify(job: Job, order: Order, source_folder: Path) -> Manifest:
    """Verify one artifact of a job and write its card and manifest; if already verified, only judge it again.

    Raises:
        QuantmillError: an error that isn't the artifact's: the source, the text, the device.
    """
    folder = artifact_folder(job.workspace, order)
    record = ArtifactMade.model_validate_json(record_path(folder).read_text())
    previous = _verified_before(folder, job.verification, order)
    if previous is not None:
        verdict = _judged_again(previous.verdict, order, folder)
        about = Circumstances(previous.source_check, previous.sequences_begin_with, previous.fallbacks)
        if verdict == previous.verdict and order.thresholds == previous.thresholds:
            return previous
    else:
        with open_source(source_folder, job.model) as source:
            verdict, about = _verdict(job, order, source, folder)
    if ReasonCode.INTEGRITY in verdict.codes:
        # The files are kept for inspection; without its record, the next run makes the artifact again.
        record_path(folder).unlink()
    return _seal(job, order, folder, source_folder, record, verdict, about)


def _verified_before(folder: Path, verification: Verification, order: Order) -> Manifest | None:
    """The manifest of exactly these bytes, this text and these runtimes, if only thresholds decided it, and the source
    was checked; otherwise remove it."""
    try:
        manifest = hub.check_bytes(folder)
    except CheckpointError:
        manifest = None
    if (
        manifest
        and manifest.source_check is not None
        and manifest.verification.same_as(verification)
        and manifest.checked_in(order.runtimes)
        and all(code.by_threshold for code in manifest.verdict.codes)
    ):
        return manifest
    (folder / MANIFEST).unlink(missing_ok=True)
    return None


def _judged_again(verdict: Verdict, order: Order, folder: Path) -> Verdict:
    """Judge the same evidence by the order's current thresholds, which a zoo may have changed."""
    facts = gates.Evidence(
        metrics=verdict.metrics,
        runtime=verdict.runtime,
        other_runtimes=verdict.other_runtimes,
        worst_layers=verdict.worst_layers,
        layer_noise=verdict.layer_noise,
        generations=verdict.generations,
        picture=verdict.picture,
    )
    return gates.judge(facts, order.thresholds, folder, order.recipe)


def _verdict(job: Job, order: Order, source: ModelSource, folder: Path) -> tuple[Verdict, Circumstances]:
    """Check the source, gather the evidence about one artifact, and judge it."""
    comparison = Comparison.of_job(job, source, order.runtimes)
    comparison.load()
    checked, notes = comparison.check_source(), comparison.held_out.notes
    if checked.unchecked:
        notes += (f"the source's reading wasn't checked against transformers: {checked.unchecked}",)
    workspace = Path(job.workspace)
    config = read_config(source.folder)
    shown = None if checked.unchecked else picture.source_shown(job.model, source.folder, config, workspace)
    decoded = FORMATS[order.recipe.format].decoded
    about = Circumstances(checked, comparison.begin_with, notes if decoded else (*notes, undecoded.NOTE))
    try:
        if decoded:
            device, _ = compute_device()
            with open_decoded(folder, trust_remote_code=job.model.trust_remote_code, device=device) as artifact:
                facts = _facts(order, comparison, folder, artifact)
        else:
            facts = _undecoded(order, comparison, folder)
        if shown is not None and not facts.integrity and FORMATS[order.recipe.format].towers:
            seen, problems = picture.check(shown, job.model, folder, config, workspace)
            facts = replace(facts, picture=seen, runtime_problems=(*facts.runtime_problems, *problems))
    except (UserError, NumericalError) as error:
        # The source is already loaded, so the unreadable file is the artifact's.
        facts = gates.Evidence(integrity=[f"integrity: {error}"])
    return gates.judge(facts, order.thresholds, folder, order.recipe), about


def _facts(order: Order, comparison: Comparison, folder: Path, artifact: Source | Decoded) -> gates.Evidence:
    """Inspect the files, and measure only if they are intact: a broken artifact is made again."""
    intended = frozenset(layout_of(folder, order.recipe, comparison.reference).modules)
    expected = Folded(comparison.source, folds_folder(folder), comparison.transposed)
    source = comparison.source
    exact = source.exact if isinstance(source, KeptSource) else None
    left_out = comparison.left_out(order.recipe.format)
    findings = integrity.inspect(expected, artifact, folder, intended, left_out, exact)
    if findings.problems:
        return gates.Evidence(integrity=findings.problems, worst_layers=findings.worst, layer_noise=findings.by_layer)
    return comparison.measure(folder, artifact, findings)


def _undecoded(order: Order, comparison: Comparison, folder: Path) -> gates.Evidence:
    """As ``_facts``, for a format that its runtime alone reads."""
    intended = frozenset(layout_of(folder, order.recipe, comparison.reference).modules)
    findings = undecoded.inspect(comparison.source, folder, intended, comparison.unused)
    if findings.problems:
        return gates.Evidence(integrity=findings.problems)
    return undecoded.measure(comparison, folder, findings.problems)


def _seal(
    job: Job,
    order: Order,
    folder: Path,
    source_folder: Path,
    record: ArtifactMade,
    verdict: Verdict,
    about: Circumstances,
) -> Manifest:
    """Write the card and its chart, then the manifest of all files, which fixes the artifact's bytes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    environment = {**versions(), **record.made_with}
    with open_source(source_folder, job.model) as source:
        reference_bytes = source.bytes
        config = read_config(source_folder)
        model_type = str(config.get("model_type") or "")
        family = family_of(model_type)
        kinds = kinds_of(order.recipe, _headers(source), conv1d=family.conv1d, model_type=model_type)
        kinds = kinds._replace(multimodal=is_multimodal(config))
    checked = about.source_check
    fallbacks = tuple(dict.fromkeys((*record.fallbacks, *about.notes)))
    chart = charts.of_artifact(verdict, order.thresholds, record.bytes, reference_bytes)
    if chart is None:
        (folder / CHART).unlink(missing_ok=True)
    else:
        (folder / CHART).write_bytes(chart)
    told = Told(
        environment,
        kinds,
        fallbacks,
        loader_of(config),
        checked,
        record.bytes,
        reference_bytes,
        chats=has_chat_template(source_folder),
        chart=CHART if chart else None,
    )
    card = render_card(job, order, source_folder, verdict, told)
    write_text(folder / "README.md", card)
    files = {
        str(path.relative_to(folder)): FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    manifest = Manifest(
        fingerprint=order.fingerprint,
        model=job.model.id,
        revision=job.model.revision,
        recipe=order.recipe,
        calibration=job.calibration.public if job.calibration and order.recipe.calibrated else None,
        verification=job.verification.public,
        thresholds=order.thresholds,
        files=files,
        verdict=verdict,
        environment=environment,
        fallbacks=fallbacks,
        bytes=record.bytes,
        expert_tokens=record.expert_tokens,
        reference_bytes=reference_bytes,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source_check=checked,
        sequences_begin_with=about.begin_with,
    )
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _headers(source: ModelSource) -> list[TensorHeader]:
    return [TensorHeader(name, tuple(header.shape), "") for name, header in source.headers.items()]
