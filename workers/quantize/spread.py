"""Spreads the pass over one model across workers that share a disk, in three steps: gather, solve, join.

*gather*: each part streams the model over its share of the calibration and held-out text, in the micro-batches of a
single pass, and logs every layer's inputs on disk. *solve*: each part takes some of the layers, computes their
statistics from all parts' logs, and quantizes these layers for all artifacts. *join*: one worker assembles the
artifacts.

The result is byte-identical to a single pass's. Each step is idempotent: called again, it resumes, or returns if it has
finished. All parts must finish a step before the next one starts.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.read_ahead import ReadAhead
from workers.checkpoint.source import ModelSource
from workers.engines.maker import Maker
from workers.engines.table import maker_class
from workers.errors import TransientError, UnsupportedRecipe
from workers.formats.kept import open_source
from workers.machine.files import read_model, write_text
from workers.machine.preflight import versions
from workers.methods.layer import LayerWork
from workers.model import batching, reference
from workers.model.device import open_model
from workers.model.folding import Fold
from workers.model.forward import Batch, Lanes, LoadedLayer, Streaming
from workers.model.loading import StreamedModel
from workers.model.statistics import InputStatistics, Observer
from workers.model.upload import LayerTensors, Upload
from workers.numerics.precision import coarse_forwards
from workers.quantize.attempts import (
    CheckpointTimer,
    Sizes,
    attempts,
    failed_artifact,
    failure_alone,
    note_data,
    note_smaller,
)
from workers.quantize.gathered import Log, Recorder, replay, tensors_of
from workers.quantize.inputs import (
    CALIBRATION,
    PROBE,
    REFERENCE,
    Tokens,
    existing_artifacts,
    folds_of,
    observer_of,
    watched_inputs,
)
from workers.quantize.resume import NotResumable, PassFolder, PassState, group_state, locked_pass_folder
from workers.quantize.solved import LayerWriter, SolvedFolder, SolvedLayer
from workers.spec.base import Frozen, canonical_json
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.split import layers_of, sequential, slice_of


def gather(job: Job, folder: Path, part: int, parts: int) -> None:
    """Log one part's inputs of all layers on disk, and compute its part of the reference.

    Raises:
        UnsupportedRecipe: a recipe can't be spread.
        QuantmillError: an error that concerns all artifacts: the model, the text, the device.
    """
    spread_folder = SpreadFolder(job, parts)
    if spread_folder.gathered(part) is not None or not existing_artifacts(job)[1]:
        return
    with open_source(folder, job.model) as source:
        _Gathering(job, folder, source, spread_folder, part).run()


def solve(job: Job, folder: Path, part: int, parts: int) -> None:
    """Quantize one part of the layers for all artifacts, each layer separately.

    Raises:
        UnsupportedRecipe: a recipe can't be spread.
        TransientError: not all parts have gathered.
        QuantmillError: an error that concerns all artifacts: broken activations, the device.
    """
    spread_folder = SpreadFolder(job, parts)
    _, orders = existing_artifacts(job)
    if not orders:
        return
    if any(order.recipe.calibrated for order in orders):
        spread_folder.require_gathered()
    with open_source(folder, job.model) as source:
        _Solving(job, source, open_model(job, folder, source), spread_folder, orders).run(part)


def join(job: Job, folder: Path, parts: int) -> tuple[tuple[ArtifactMade, ...], int]:
    """Assemble the artifacts and the reference; returns the same as ``one_pass.quantize``.

    Raises:
        UnsupportedRecipe: a recipe can't be spread.
        TransientError: a layer is missing.
    """
    spread_folder = SpreadFolder(job, parts)
    done, orders = existing_artifacts(job)
    with open_source(folder, job.model) as source:
        if orders:
            spread_folder.join_reference()
            streamed = open_model(job, folder, source)
            for order in orders:
                done[order.recipe.name] = _joined(job, order, source, streamed, spread_folder)
        spread_folder.clear()
        return tuple(done[order.recipe.name] for order in job.orders), source.bytes


# ------------------------------------------------------------------------------------------- on the disk


class Agreement(Frozen):
    """Micro-batch size (tokens) and reference path that all parts use; the first part's proposal wins."""

    micro_batch_tokens: int
    reference: str


class GatherRecord(Frozen):
    """Record of a part that has gathered: tokens per micro-batch used, and the full size before memory ran out."""

    micro_batch_tokens: int
    full: int
    notes: tuple[str, ...] = ()


class SpreadFolder:
    """Folder of a spread pass; its name is a digest of the job, the parts, and the versions that affect the bytes.

    Raises:
        UnsupportedRecipe: the job can't be spread.
    """

    def __init__(self, job: Job, parts: int) -> None:
        if names := sequential(job):
            raise UnsupportedRecipe(
                f"recipes {names} can't be spread: they calibrate on their own quantized layers (propagate: "
                "quantized), one after the other, or an engine makes them whole; quantize them on one worker"
            )
        identity = {
            "model": job.model.model_dump(mode="json"),
            "orders": sorted(order.fingerprint for order in job.orders),
            "verification": job.verification.model_dump(mode="json"),
            "versions": versions(),
            "parts": parts,
        }
        digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
        self.parts = parts
        self._path = Path(job.workspace) / "passes" / f"{digest[:32]}-spread"

    def agree(self, proposed: Agreement) -> Agreement:
        """The agreement of all parts: the first proposal, created atomically by a hard link."""
        agreement_file = self._path / "agreement.json"
        agreement_file.parent.mkdir(parents=True, exist_ok=True)
        private_file = agreement_file.with_name(f".{agreement_file.name}.{os.getpid()}")
        write_text(private_file, proposed.model_dump_json())
        try:
            os.link(private_file, agreement_file)
        except FileExistsError:
            pass
        finally:
            private_file.unlink()
        agreed = read_model(agreement_file, Agreement)
        return agreed if agreed is not None else self.agree(proposed)

    def gathering(self, part: int) -> Path:
        """Folder of a part's checkpoint, to resume after a kill."""
        return self._path / f"gathering-{part:05d}"

    def seen(self, layer: int, part: int) -> Path:
        """Log file of a part's inputs of a layer; its tensors are beside it."""
        return self._path / "seen" / f"{layer:05d}.{part:05d}.json"

    def final(self, part: int) -> reference.ReferenceFile:
        """File of the decoder's outputs for a part of the calibration."""
        return reference.ReferenceFile(self._path / "final" / f"{part:05d}.safetensors")

    def reference(self, part: int) -> reference.ReferenceFile:
        """File of a part's share of the reference."""
        return reference.ReferenceFile(self._path / "reference" / f"{part:05d}.safetensors")

    def final_statistics(self, device: str) -> InputStatistics:
        """Statistics of the decoder's outputs over all parts, in the order of the text."""
        files = [file for part in range(self.parts) if (file := self.final(part)).exists]
        return InputStatistics.of((batch for file in files for batch in reference.load(file)), device)

    def note_gathered(self, part: int, record: GatherRecord) -> None:
        """Record that a part has gathered."""
        write_text(self._record(part), record.model_dump_json())

    def gathered(self, part: int) -> GatherRecord | None:
        """A part's record; None if it hasn't gathered."""
        return read_model(self._record(part), GatherRecord)

    def require_gathered(self) -> None:
        """Refuse a calibration with missing parts.

        Raises:
            TransientError: names the missing parts.
        """
        lacking = [part for part in range(self.parts) if self.gathered(part) is None]
        if lacking:
            raise TransientError(
                f"calibration: parts {lacking} of {self.parts} are lacking in {self._path}; gather them"
            )

    def solved(self, order: Order) -> SolvedFolder:
        """The folder of an artifact's solved layers."""
        return SolvedFolder(self._path / "solved" / order.fingerprint[:16])

    def making(self, order: Order) -> Path:
        """Folder in which an artifact is assembled."""
        return self._path / "making" / order.fingerprint[:16]

    def note(self, maker: Maker) -> None:
        """Add fallbacks to a calibrated artifact: data left out, and smaller micro-batches of a part."""
        records = [record for part in range(self.parts) if (record := self.gathered(part)) is not None]
        least = min(records, key=lambda record: record.micro_batch_tokens, default=None)
        if least is not None:
            note_data(maker, least.notes)
        if least is not None and least.micro_batch_tokens < least.full:
            note_smaller(maker, least.micro_batch_tokens, least.full)

    def join_reference(self) -> None:
        """Assemble the reference, unless it exists or a share is missing."""
        agreement = self._path / "agreement.json"
        shares = [self.reference(part) for part in range(self.parts)]
        if not agreement.is_file() or not all(share.exists for share in shares):
            return
        file = reference.ReferenceFile(Path(Agreement.model_validate_json(agreement.read_text()).reference))
        if not file.exists:
            reference.store(file, [batch for share in shares for batch in reference.load(share)])

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _record(self, part: int) -> Path:
        return self._path / f"gathered-{part:05d}.json"


# ------------------------------------------------------------------------------------------- gather


def share(batches: Sequence[Batch], part: int, parts: int, tokens: int) -> list[Batch]:
    """A part's batches: whole micro-batches of a single pass, which affect the last bits; split to ``tokens`` tokens.

    With fewer micro-batches than parts, some parts get none.
    """
    return [
        smaller
        for batch in batches[slice_of(len(batches), part, parts)]
        for smaller in (reference.micro_batches(batch, tokens) if isinstance(batch, Tensor) else [batch])
    ]


class _Gathering:
    """Streams one part of the texts through the model."""

    def __init__(self, job: Job, folder: Path, source: ModelSource, spread_folder: SpreadFolder, part: int) -> None:
        self._job, self._spread_folder, self._part = job, spread_folder, part
        self._recipes = [order.recipe for order in job.orders]
        self._streamed = open_model(job, folder, source)
        self._tokens = Tokens(job, folder, list(job.orders), self._streamed.dtype, self._streamed.embedding_rows)
        self._full = batching.micro_batch_tokens(self._streamed, self._tokens.longest)
        self._agreed = spread_folder.agree(
            Agreement(micro_batch_tokens=self._full, reference=str(self._tokens.reference.path.absolute()))
        )

    def run(self) -> None:
        """Run the part through all layers."""
        with locked_pass_folder(self._spread_folder.gathering(self._part)) as folder:
            sizes = Sizes(self._full, self._tokens.longest, self._job.lean)
            attempts(folder, sizes, partial(self._attempt, folder), lambda: None)
            folder.clear()

    def _attempt(self, folder: PassFolder, state: PassState | None, size: int) -> None:
        if state is None:
            folder.clear()
        with Streaming(self._streamed) as streaming:
            groups = self._groups(streaming, size)
            if state is not None and groups:
                folder.replay(state, groups)
            timer = CheckpointTimer()
            for layer in streaming.layers(state.layers if state else 0) if groups else ():
                self._visit(layer, groups)
                if layer.index + 1 < len(self._streamed.layers) and timer.due():
                    with timer.timed():
                        _checkpoint(folder, layer.index + 1, size, groups)
            if REFERENCE in groups:
                reference.store(self._spread_folder.reference(self._part), groups[REFERENCE].outputs())
            if CALIBRATION in groups and any(recipe.needs.final for recipe in self._recipes):
                reference.store(self._spread_folder.final(self._part), groups[CALIBRATION].outputs())
        self._spread_folder.note_gathered(
            self._part, GatherRecord(micro_batch_tokens=size, full=self._full, notes=self._tokens.notes)
        )

    def _groups(self, streaming: Streaming, size: int) -> dict[str, Lanes]:
        groups: dict[str, Lanes] = {}
        if self._tokens.calibrates:
            whole = self._tokens.calibration_batches(self._agreed.micro_batch_tokens)
            groups[CALIBRATION] = streaming.lanes(share(whole, self._part, self._spread_folder.parts, size))
            if any(recipe.needs.folds for recipe in self._recipes):
                groups[PROBE] = streaming.lanes([self._tokens.probe])
        if not self._tokens.reference.exists:
            held_out = self._tokens.held_out.batches(self._agreed.micro_batch_tokens)
            groups[REFERENCE] = streaming.lanes(share(held_out, self._part, self._spread_folder.parts, size))
        return groups

    def _visit(self, layer: LoadedLayer, groups: Mapping[str, Lanes]) -> None:
        folds: list[Fold] = []
        if PROBE in groups:
            # All parts advance the probe; each part uses it on its own layers only.
            if layer.index % self._spread_folder.parts == self._part:
                folds = folds_of(self._streamed, layer, groups[PROBE])
            groups[PROBE].advance()
        if CALIBRATION in groups:
            self._record(layer, groups[CALIBRATION], folds)
        if REFERENCE in groups:
            groups[REFERENCE].advance()

    def _record(self, layer: LoadedLayer, lanes: Lanes, folds: list[Fold]) -> None:
        assert self._job.calibration is not None
        log_file = self._spread_folder.seen(layer.index, self._part)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        inputs = watched_inputs(self._streamed, layer.index, [order.recipe for order in self._job.orders])
        with LayerWriter(tensors_of(log_file)) as writer:
            recorder = Recorder(writer, all_tokens=self._job.calibration.experts == "all")
            with recorder.watching(self._streamed, inputs), coarse_forwards():
                lanes.advance()
            log = recorder.log(folds)
        write_text(log_file, log.model_dump_json())


def _checkpoint(folder: PassFolder, layers: int, size: int, groups: Mapping[str, Lanes]) -> None:
    """Checkpoint the gathering after a layer, if the layer returns only tensors."""
    try:
        states = {name: group_state(lanes, lanes.last_outputs()) for name, lanes in groups.items()}
    except NotResumable:
        return
    folder.save(PassState(layers=layers, micro_batch_tokens=size, makers={}, failed={}, groups=states), groups)


# -------------------------------------------------------------------------------------------- solve


class _Solving:
    """Solves layers separately; skips layers that are solved already."""

    def __init__(
        self, job: Job, source: ModelSource, streamed: StreamedModel, spread_folder: SpreadFolder, orders: list[Order]
    ) -> None:
        self._job, self._source, self._streamed, self._spread_folder = job, source, streamed, spread_folder
        self._makers: list[Maker] = []
        for order in orders:
            if spread_folder.solved(order).failure() is None and (maker := self._maker(order)) is not None:
                self._makers.append(maker)

    def _maker(self, order: Order) -> Maker | None:
        """The maker for an order; None on an error, which ``join`` reports."""
        try:
            return _maker(self._job, order, self._streamed, self._source, self._spread_folder)
        except Exception as error:
            failure_alone(order, error)
            return None

    def run(self, part: int) -> None:
        """Solve the layers of a part."""
        mine = layers_of(self._work(), part, self._spread_folder.parts)
        todo = [layer for layer in mine if self._lacking(layer)]
        keys = [self._streamed.keys_of_layer(layer) for layer in todo]
        with torch.inference_mode(), ReadAhead(self._source, keys, Upload(self._streamed.device)) as ahead:
            for position, layer in enumerate(todo):
                self._make(layer, ahead.take(position))

    def _work(self) -> list[int]:
        """Cost of each layer: its number of elements, or the multiplications by X^T X if a recipe is calibrated."""
        work = [
            sum(math.prod(self._source.headers[key].shape) for key in self._streamed.keys_of_layer(layer))
            for layer in range(len(self._streamed.layers))
        ]
        if any(order.recipe.calibrated for order in self._job.orders):
            for weight in self._streamed.weights:
                rows, columns = weight.shape_OI
                work[weight.layer] += rows * columns * columns
        return work

    def _lacking(self, layer: int) -> list[Maker]:
        return [maker for maker in self._makers if not self._spread_folder.solved(maker.order).has(layer)]

    def _make(self, layer: int, tensors: LayerTensors) -> None:
        tensors.wait()
        makers = self._lacking(layer)
        work = LayerWork(layer, tensors)
        if any(maker.order.recipe.calibrated for maker in makers):
            work = LayerWork(layer, tensors, *self._statistics(layer, makers))
        for maker in makers:
            self._make_for(maker, work)

    def _statistics(self, layer: int, makers: Sequence[Maker]) -> tuple[Observer, list[Fold]]:
        """A layer's statistics over all parts, in the order of the text, and its folds."""
        assert self._job.calibration is not None
        recipes = [maker.order.recipe for maker in makers]
        observer, folds = observer_of(self._job.calibration, recipes), list[Fold]()
        with observer.gathering(watched_inputs(self._streamed, layer, recipes)), coarse_forwards():
            for part in range(self._spread_folder.parts):
                log_file = self._spread_folder.seen(layer, part)
                log = Log.model_validate_json(log_file.read_text())
                folds += replay(log, tensors_of(log_file), observer, self._streamed.device)
        observer.check(layer)
        return observer, folds

    def _make_for(self, maker: Maker, work: LayerWork) -> None:
        solved, before = self._spread_folder.solved(maker.order), maker.seconds
        try:
            with maker.timed(), solved.writer(work.index) as writer:
                fallbacks = maker.layer_into(writer, work)
        except Exception as error:
            solved.note_failure(work.index, failure_alone(maker.order, error))
            self._makers.remove(maker)
        else:
            solved.note(work.index, writer, fallbacks, maker.seconds - before)


# --------------------------------------------------------------------------------------------- join


def _joined(
    job: Job, order: Order, source: ModelSource, streamed: StreamedModel, spread_folder: SpreadFolder
) -> ArtifactMade:
    """Assemble one artifact from its layers."""
    solved = spread_folder.solved(order)
    if failure := solved.failure():
        return failed_artifact(order, failure, 0.0)
    try:
        maker = _maker(job, order, streamed, source, spread_folder)
    except Exception as error:
        return failed_artifact(order, failure_alone(order, error), 0.0)
    by_index = [solved.layer(layer) for layer in range(len(streamed.layers))]
    layers = [layer for layer in by_index if layer is not None]
    if len(layers) < len(by_index):
        lacking = [index for index, layer in enumerate(by_index) if layer is None]
        raise TransientError(f"recipe {order.recipe.name!r}: no part has made layers {lacking[:5]}; solve them")
    try:
        with maker.timed():
            return _whole(maker, layers, spread_folder, streamed.device)
    except Exception as error:
        return failed_artifact(order, failure_alone(order, error), maker.seconds)
    finally:
        maker.release()


def _whole(maker: Maker, layers: Sequence[SolvedLayer], spread_folder: SpreadFolder, device: str) -> ArtifactMade:
    maker.begin()
    spread_folder.note(maker)
    for layer in layers:
        maker.adopt(layer.tensors, layer.fallbacks, layer.seconds)
    if maker.order.recipe.needs.final:
        maker.final = spread_folder.final_statistics(device)
    return maker.finish()


def _maker(job: Job, order: Order, streamed: StreamedModel, source: ModelSource, spread_folder: SpreadFolder) -> Maker:
    return maker_class(order.recipe)(job, order, streamed, source, spread_folder.making(order))
