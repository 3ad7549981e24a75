"""The pass over one model spread over several workers that share a disk: gather, solve, join.

*gather*: each part streams the model over its share of the calibration and of the held-out text, in the micro-batches
of a single pass, and leaves what came to every layer on the disk. *solve*: each part takes some of the layers, makes
their statistics of what all parts have seen, and makes these layers of all artifacts. *join*: one worker puts the
artifacts together.

The bytes are those of one pass. A step may be called again at any time: it goes on where it was, or finds that it's
done. All parts of a step have to be through before the next begins.
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
from workers.checkpoint.source import Source
from workers.engines.maker import Maker
from workers.engines.table import maker_class
from workers.errors import TransientError, UnsupportedRecipe
from workers.machine.files import write_text
from workers.machine.preflight import versions
from workers.methods.layer import LayerWork
from workers.model import batching, reference
from workers.model.device import open_model
from workers.model.folding import Fold
from workers.model.forward import Lanes, LoadedLayer, Streaming
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer, inputs_of
from workers.numerics.precision import coarse_forwards
from workers.quantize.attempts import Keeping, Sizes, attempts, failure_alone, not_made, note_smaller
from workers.quantize.gathered import Log, Recorder, replay, tensors_of
from workers.quantize.inputs import (
    CALIBRATION,
    PROBE,
    PROBE_TOKENS,
    REFERENCE,
    Tokens,
    folds_of,
    made_before,
    observer_of,
)
from workers.quantize.resume import NotResumable, PassFolder, PassState, group_state, locked_pass_folder
from workers.quantize.solved import LayerWriter, SolvedFolder, SolvedLayer
from workers.spec.base import Frozen, canonical_json
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.split import layers_of, sequential, slice_of


def gather(job: Job, folder: Path, part: int, parts: int) -> None:
    """Leave what one part of the calibration shows of the layers, and its part of the reference, on the disk.

    Raises:
        UnsupportedRecipe: a recipe that can't be spread.
        QuantmillError: what fails all artifacts: the model, the text, the device.
    """
    home = SpreadFolder(job, parts)
    if home.gathered(part) is not None or not made_before(job)[1]:
        return
    with Source(folder, allow_pickle=job.model.allow_pickle) as source:
        _Gathering(job, folder, source, home, part).run()


def solve(job: Job, folder: Path, part: int, parts: int) -> None:
    """Make one part of the layers of all artifacts, each by itself.

    Raises:
        UnsupportedRecipe: a recipe that can't be spread.
        TransientError: not all parts have gathered.
        QuantmillError: what fails all artifacts: broken activations, the device.
    """
    home = SpreadFolder(job, parts)
    _, orders = made_before(job)
    if not orders:
        return
    if any(order.recipe.calibrated for order in orders):
        home.require_gathered()
    with Source(folder, allow_pickle=job.model.allow_pickle) as source:
        _Solving(job, source, open_model(job, folder, source), home, orders).run(part)


def join(job: Job, folder: Path, parts: int) -> tuple[tuple[ArtifactMade, ...], int]:
    """Put the artifacts together, and the reference; results as of ``one_pass.quantize``.

    Raises:
        UnsupportedRecipe: a recipe that can't be spread.
        TransientError: a layer that no part has made.
    """
    home = SpreadFolder(job, parts)
    done, orders = made_before(job)
    with Source(folder, allow_pickle=job.model.allow_pickle) as source:
        if orders:
            home.join_reference()
            streamed = open_model(job, folder, source)
            for order in orders:
                done[order.recipe.name] = _joined(job, order, source, streamed, home)
        home.clear()
        return tuple(done[order.recipe.name] for order in job.orders), source.bytes


# ------------------------------------------------------------------------------------------- on the disk


class Agreement(Frozen):
    """What all parts have to split the texts by; the first to come decides."""

    micro_batch_tokens: int
    reference: str

    def share(self, tokens_NT: Tensor, part: int, parts: int) -> list[Tensor]:
        """A part's sequences, int64 [B, T] each: whole micro-batches of a single pass, which decide on last bits.

        Where there are fewer than parts, some parts get none.
        """
        batches = reference.micro_batches(tokens_NT, self.micro_batch_tokens)
        return batches[slice_of(len(batches), part, parts)]


class Gathered(Frozen):
    """What a part that is through says: tokens of the micro-batches that it took, and of those that it was to take."""

    micro_batch_tokens: int
    full: int


class SpreadFolder:
    """The folder of a pass that is spread; named by the job, the parts, and the versions that decide on the bytes.

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
        """What all parts go by: the first proposal."""
        place = self._path / "agreement.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        own = place.with_name(f".{place.name}.{os.getpid()}")
        write_text(own, proposed.model_dump_json())
        try:
            os.link(own, place)
        except FileExistsError:
            pass
        finally:
            own.unlink()
        return Agreement.model_validate_json(place.read_text())

    def gathering(self, part: int) -> Path:
        """Where a part keeps its state, to go on after a kill."""
        return self._path / f"gathering-{part:05d}"

    def seen(self, layer: int, part: int) -> Path:
        """Where the log of what a part has seen of a layer goes; its tensors beside it."""
        return self._path / "seen" / f"{layer:05d}.{part:05d}.json"

    def reference(self, part: int) -> reference.ReferenceFile:
        """Where a part's share of the reference goes."""
        return reference.ReferenceFile(self._path / "reference" / f"{part:05d}.safetensors")

    def note_gathered(self, part: int, said: Gathered) -> None:
        """A part is through."""
        write_text(self._record(part), said.model_dump_json())

    def gathered(self, part: int) -> Gathered | None:
        """What a part said when it was through; None if it isn't."""
        record = self._record(part)
        return Gathered.model_validate_json(record.read_text()) if record.is_file() else None

    def require_gathered(self) -> None:
        """Refuse a calibration that lacks a part.

        Raises:
            TransientError: naming the parts.
        """
        lacking = [part for part in range(self.parts) if self.gathered(part) is None]
        if lacking:
            raise TransientError(
                f"calibration: parts {lacking} of {self.parts} are lacking in {self._path}; gather them"
            )

    def solved(self, order: Order) -> SolvedFolder:
        """The layers of an artifact."""
        return SolvedFolder(self._path / "solved" / order.fingerprint[:16])

    def making(self, order: Order) -> Path:
        """Where an artifact is put together."""
        return self._path / "making" / order.fingerprint[:16]

    def note_smaller(self, maker: Maker) -> None:
        """Say in a calibrated artifact that some part had no memory for whole micro-batches."""
        said = [found for part in range(self.parts) if (found := self.gathered(part)) is not None]
        least = min(said, key=lambda found: found.micro_batch_tokens, default=None)
        if least is not None and least.micro_batch_tokens < least.full:
            note_smaller(maker, least.micro_batch_tokens, least.full)

    def join_reference(self) -> None:
        """Put the reference together, unless it's there, or no part has made any of it."""
        agreement = self._path / "agreement.json"
        shares = [self.reference(part) for part in range(self.parts)]
        if not agreement.is_file() or not all(share.exists for share in shares):
            return
        place = reference.ReferenceFile(Path(Agreement.model_validate_json(agreement.read_text()).reference))
        if not place.exists:
            reference.store(place, [batch for share in shares for batch in reference.load(share)])

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _record(self, part: int) -> Path:
        return self._path / f"gathered-{part:05d}.json"


# ------------------------------------------------------------------------------------------- gather


class _Gathering:
    """One part of the texts on its way through the model."""

    def __init__(self, job: Job, folder: Path, source: Source, home: SpreadFolder, part: int) -> None:
        self._job, self._home, self._part = job, home, part
        self._recipes = [order.recipe for order in job.orders]
        self._streamed = open_model(job, folder, source)
        self._tokens = Tokens(job, folder, list(job.orders), self._streamed.dtype)
        self._full = batching.micro_batch_tokens(self._streamed, self._tokens.longest)
        self._agreed = home.agree(
            Agreement(micro_batch_tokens=self._full, reference=str(self._tokens.place.path.absolute()))
        )

    def run(self) -> None:
        """Take the part through all layers."""
        with locked_pass_folder(self._home.gathering(self._part)) as folder:
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
            keeping = Keeping()
            for layer in streaming.layers(state.layers if state else 0) if groups else ():
                self._visit(layer, groups)
                if layer.index + 1 < len(self._streamed.layers) and keeping.worth_it():
                    with keeping.timed():
                        _keep(folder, layer.index + 1, size, groups)
            if REFERENCE in groups:
                reference.store(self._home.reference(self._part), groups[REFERENCE].outputs())
        self._home.note_gathered(self._part, Gathered(micro_batch_tokens=size, full=self._full))

    def _groups(self, streaming: Streaming, size: int) -> dict[str, Lanes]:
        found: dict[str, Lanes] = {}
        if self._tokens.calibration is not None:
            found[CALIBRATION] = streaming.lanes(self._share(self._tokens.calibration, size))
            if any(recipe.needs.folds for recipe in self._recipes):
                found[PROBE] = streaming.lanes([self._tokens.calibration[:1, :PROBE_TOKENS]])
        if not self._tokens.place.exists:
            found[REFERENCE] = streaming.lanes(self._share(self._tokens.held_out, size))
        return found

    def _share(self, tokens_NT: Tensor, size: int) -> list[Tensor]:
        whole = self._agreed.share(tokens_NT, self._part, self._home.parts)
        return [batch for tokens in whole for batch in reference.micro_batches(tokens, size)]

    def _visit(self, layer: LoadedLayer, groups: Mapping[str, Lanes]) -> None:
        folds: list[Fold] = []
        if PROBE in groups:
            # All parts take the probe along; each looks at its own layers with it.
            if layer.index % self._home.parts == self._part:
                folds = folds_of(self._streamed, layer, groups[PROBE])
            groups[PROBE].advance()
        if CALIBRATION in groups:
            self._record(layer, groups[CALIBRATION], folds)
        if REFERENCE in groups:
            groups[REFERENCE].advance()

    def _record(self, layer: LoadedLayer, lanes: Lanes, folds: list[Fold]) -> None:
        assert self._job.calibration is not None
        place = self._home.seen(layer.index, self._part)
        place.parent.mkdir(parents=True, exist_ok=True)
        inputs = inputs_of(self._streamed, layer.index)
        with LayerWriter(tensors_of(place)) as writer:
            recorder = Recorder(writer, all_tokens=self._job.calibration.experts == "all")
            with recorder.watching(self._streamed, inputs), coarse_forwards():
                lanes.advance()
            log = recorder.log(folds)
        write_text(place, log.model_dump_json())


def _keep(folder: PassFolder, layers: int, size: int, groups: Mapping[str, Lanes]) -> None:
    """Keep the state after a layer, if the model's layers allow it."""
    try:
        states = {name: group_state(lanes, lanes.last_outputs()) for name, lanes in groups.items()}
    except NotResumable:
        return
    folder.save(PassState(layers=layers, micro_batch_tokens=size, makers={}, failed={}, groups=states), groups)


# -------------------------------------------------------------------------------------------- solve


class _Solving:
    """Makes layers, each by itself; what is there already is left."""

    def __init__(
        self, job: Job, source: Source, streamed: StreamedModel, home: SpreadFolder, orders: list[Order]
    ) -> None:
        self._job, self._source, self._streamed, self._home = job, source, streamed, home
        self._makers: list[Maker] = []
        for order in orders:
            if home.solved(order).failure() is None and (maker := self._maker(order)) is not None:
                self._makers.append(maker)

    def _maker(self, order: Order) -> Maker | None:
        """The maker for an order; why there can be none is told where the artifacts are joined."""
        try:
            return _maker(self._job, order, self._streamed, self._source, self._home)
        except Exception as error:
            failure_alone(order, error)
            return None

    def run(self, part: int) -> None:
        """Make the layers of a part."""
        mine = layers_of(self._work(), part, self._home.parts)
        todo = [layer for layer in mine if self._lacking(layer)]
        keys = [self._streamed.keys_of_layer(layer) for layer in todo]
        with torch.inference_mode(), ReadAhead(self._source, keys) as ahead:
            for position, layer in enumerate(todo):
                self._make(layer, ahead.take(position))

    def _work(self) -> list[int]:
        """What each layer takes: by its bytes, or by the products with X^T X where there are any."""
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
        return [maker for maker in self._makers if not self._home.solved(maker.order).has(layer)]

    def _make(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        makers = self._lacking(layer)
        work = LayerWork(layer, tensors)
        if any(maker.order.recipe.calibrated for maker in makers):
            work = LayerWork(layer, tensors, *self._seen(layer, makers))
        for maker in makers:
            self._make_for(maker, work)

    def _seen(self, layer: int, makers: Sequence[Maker]) -> tuple[Observer, list[Fold]]:
        """The statistics of a layer over all parts, in the order of the text, and its folds."""
        assert self._job.calibration is not None
        magnitudes = any(maker.order.recipe.needs.magnitudes for maker in makers)
        observer, folds = observer_of(self._job.calibration, magnitudes=magnitudes), list[Fold]()
        with observer.gathering(inputs_of(self._streamed, layer)), coarse_forwards():
            for part in range(self._home.parts):
                place = self._home.seen(layer, part)
                log = Log.model_validate_json(place.read_text())
                folds += replay(log, tensors_of(place), observer, self._streamed.device)
        observer.check(layer)
        return observer, folds

    def _make_for(self, maker: Maker, work: LayerWork) -> None:
        solved, before = self._home.solved(maker.order), maker.seconds
        try:
            with maker.timed(), solved.writer(work.index) as writer:
                fallbacks = maker.layer_into(writer, work)
        except Exception as error:
            solved.note_failure(work.index, failure_alone(maker.order, error))
            self._makers.remove(maker)
        else:
            solved.note(work.index, writer, fallbacks, maker.seconds - before)


# --------------------------------------------------------------------------------------------- join


def _joined(job: Job, order: Order, source: Source, streamed: StreamedModel, home: SpreadFolder) -> ArtifactMade:
    """One artifact, put together from its layers."""
    solved = home.solved(order)
    if failure := solved.failure():
        return not_made(order, failure, 0.0)
    try:
        maker = _maker(job, order, streamed, source, home)
    except Exception as error:
        return not_made(order, failure_alone(order, error), 0.0)
    found = [solved.layer(layer) for layer in range(len(streamed.layers))]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found):
        lacking = [index for index, layer in enumerate(found) if layer is None]
        raise TransientError(f"recipe {order.recipe.name!r}: no part has made layers {lacking[:5]}; solve them")
    try:
        with maker.timed():
            return _whole(maker, layers, home)
    except Exception as error:
        return not_made(order, failure_alone(order, error), maker.seconds)
    finally:
        maker.release()


def _whole(maker: Maker, layers: Sequence[SolvedLayer], home: SpreadFolder) -> ArtifactMade:
    maker.begin()
    home.note_smaller(maker)
    for layer in layers:
        maker.adopt(layer.tensors, layer.fallbacks, layer.seconds)
    return maker.finish()


def _maker(job: Job, order: Order, streamed: StreamedModel, source: Source, home: SpreadFolder) -> Maker:
    return maker_class(order.recipe)(job, order, streamed, source, home.making(order))
