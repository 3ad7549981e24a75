"""The verify stage: integrity, fidelity, runtime; then the card, and last of all the manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from workers import hub, reference
from workers.calibration import held_out_tokens, load_tokenizer
from workers.card import render_card
from workers.checkpoint import Source
from workers.content import file_sha256, write_text
from workers.environment import versions
from workers.errors import CheckpointError, NumericalError, UserError
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.folded import Folded
from workers.forward import Head, stream
from workers.job import (
    MANIFEST,
    ArtifactMade,
    Calibration,
    FileEntry,
    Job,
    Manifest,
    Metrics,
    Order,
    Runtime,
    Verdict,
    Verification,
    artifact_folder,
)
from workers.loading import StreamedModel
from workers.makers import folds_folder, record_path
from workers.methods.schemes import schemes_of
from workers.quantize import checkpoint_dtype, compute_device
from workers.recipes import BitsAndBytesRecipe, Recipe
from workers.verify import fidelity, gates, integrity, runtime
from workers.verify.activations import rounded_inputs

RUNTIME_SEQUENCES, RUNTIME_TOKENS = 2, 128


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
            verdict = _Verification(job, order, source, place).verdict()
    if any(reason.startswith("integrity:") for reason in verdict.reasons):
        # Kept to be looked at, but what isn't whole is made anew by the next run.
        record_path(place).unlink()
    return _seal(job, order, place, source_folder, made, verdict)


def _verified_before(place: Path, verification: Verification) -> Manifest | None:
    """The manifest of exactly these bytes, measured on the same text, on which only the gates have to decide."""
    try:
        manifest = hub.check_bytes(place)
    except CheckpointError:
        manifest = None
    if manifest and manifest.verification.same_as(verification) and not _beyond_gates(manifest.verdict):
        return manifest
    (place / MANIFEST).unlink(missing_ok=True)
    return None


def _beyond_gates(verdict: Verdict) -> list[str]:
    """Reasons that no threshold can lift: broken files, a runtime that doesn't load them."""
    return [reason for reason in verdict.reasons if not reason.startswith(gates.MEASURED)]


def _judged_again(verdict: Verdict, order: Order) -> Verdict:
    """The same facts by the gates of now: a zoo may have changed them."""
    return gates.judge((), verdict.metrics, verdict.runtime, (), order.thresholds, verdict.worst_layers)


def intended_modules(recipe: Recipe, streamed: StreamedModel) -> frozenset[str]:
    """The checkpoint's names of the modules that a recipe quantizes in this model."""
    if isinstance(recipe, BitsAndBytesRecipe):
        from workers.methods import bitsandbytes

        converted = bitsandbytes.plan(streamed.model, recipe).converted
        return frozenset(w.module for w in streamed.weights if w.input[0].removesuffix(".weight") in converted)
    schemes = schemes_of(recipe, streamed)
    return frozenset(weight.module for weight in streamed.weights if weight.key in schemes)


class _Verification:
    """One artifact against its source."""

    def __init__(self, job: Job, order: Order, source: Source, place: Path) -> None:
        device, dtype = compute_device()
        self._job = job
        self._order = order
        self._source = source
        self._place = place
        self._dtype = dtype or checkpoint_dtype(source)
        self._device = device
        self._trust = job.model.trust_remote_code
        self._tokens = held_out_tokens(job.verification, load_tokenizer(source.folder, job.model))
        self._reference = self._streamed(source.folder, source)

    def verdict(self) -> Verdict:
        """All facts, and what the gates say of them."""
        try:
            with open_decoded(self._place, trust_remote_code=self._trust) as artifact:
                return self._examine(artifact)
        except (UserError, NumericalError) as error:
            # The source was read before: what can't be read now is the artifact.
            return gates.judge([f"integrity: {error}"], None, None, [], self._order.thresholds)

    def _examine(self, artifact: Source | Decoded) -> Verdict:
        intended = intended_modules(self._order.recipe, self._reference)
        transposed = frozenset(weight.key for weight in self._reference.weights if weight.transposed)
        meant = Folded(self._source, folds_folder(self._place), transposed)
        found = integrity.inspect(meant, artifact, self._place, intended)
        ours = self._streamed(self._place, artifact)
        with rounded_inputs(ours, artifact):
            hidden = stream(ours, reference.micro_batches(self._tokens))
        metrics = self._metrics(Head(ours), hidden)
        answer, problems = self._runtime(Head(ours), hidden)
        return gates.judge(found.problems, metrics, answer, problems, self._order.thresholds, found.worst)

    def _metrics(self, head: Head, hidden: list[Tensor]) -> Metrics:
        reference_hidden = self._reference_hidden()
        reference_head = Head(self._reference)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for theirs, ours in zip(fidelity.rows(reference_hidden), fidelity.rows(hidden), strict=True):
                yield reference_head.logits(theirs[None])[0].float(), head.logits(ours[None])[0].float()

        return fidelity.compare(pairs(), self._tokens)

    def _reference_hidden(self) -> list[Tensor]:
        place = reference.place_of(self._job, self._tokens, self._dtype)
        if not place.exists:
            reference.store(place, stream(self._reference, reference.micro_batches(self._tokens)))
        return reference.load(place)

    def _runtime(self, head: Head, hidden: list[Tensor]) -> tuple[Runtime | None, tuple[str, ...]]:
        """What the library that users have makes of the artifact, in a process of its own."""
        tokens = self._tokens[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS].contiguous()
        ours = head.logits(torch.cat(hidden)[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS]).float().cpu()
        scratch_root = Path(self._job.workspace) / "scratch"
        scratch_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch_root) as scratch:
            answer = runtime.ask(self._place, tokens, Path(scratch), self._trust)
        if answer.logits is None:
            return None, answer.problems
        if not bool(torch.isfinite(answer.logits).all()):
            return None, (*answer.problems, f"runtime {answer.name}: NaN or Inf in its logits")
        difference = answer.logits - ours
        found = Runtime(
            name=answer.name,
            version=answer.version,
            max_abs_logit_difference=difference.abs().max().item(),
            # Not the largest: half-precision noise sends a token to another expert now and then.
            relative_logit_difference=difference.square().mean().sqrt().item() / max(ours.std().item(), 1e-9),
            generated=answer.generated,
        )
        return found, answer.problems

    def _streamed(self, folder: Path, tensors: Source | Decoded) -> StreamedModel:
        return StreamedModel(folder, tensors, dtype=self._dtype, device=self._device, trust_remote_code=self._trust)


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
    write_text(place / "README.md", render_card(job, order, source_folder, verdict, environment, made.fallbacks))
    files = {
        str(path.relative_to(place)): FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    with Source(source_folder, allow_pickle=job.model.allow_pickle) as source:
        reference_bytes = source.bytes
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
