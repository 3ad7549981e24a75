"""The quantize stage: one pass over a model's weights makes its reference and all of its artifacts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from workers.checkpoint.source import Source
from workers.engines import whole
from workers.engines.maker import Maker, MakerState
from workers.engines.table import maker_class
from workers.methods.layer import LayerWork
from workers.model import batching, reference
from workers.model.device import open_model
from workers.model.folding import Fold
from workers.model.forward import Lanes, LoadedLayer, Streaming
from workers.model.statistics import Observer
from workers.model.text import calibration_tokens, load_tokenizer
from workers.numerics.precision import coarse_forwards
from workers.quantize.attempts import Keeping, Sizes, attempts, failure_alone, not_made, note_smaller
from workers.quantize.inputs import (
    CALIBRATION,
    OWN,
    PROBE,
    PROBE_TOKENS,
    REFERENCE,
    Tokens,
    folds_of,
    made_before,
    observer_of,
    own,
)
from workers.quantize.resume import NotResumable, PassFolder, PassState, group_state, locked_pass_folder
from workers.spec.engines import ENGINES
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.recipes import Recipe


def quantize(job: Job, folder: Path) -> tuple[tuple[ArtifactMade, ...], int]:
    """Make a job's artifacts that aren't there yet; return all of them, and the bytes of the source's weights.

    An artifact that fails is returned with its error; the others are made all the same.

    Raises:
        QuantmillError: what fails all of them: the model, the calibration text, the device.
    """
    done, missing = made_before(job)
    in_the_pass = [order for order in missing if ENGINES[order.recipe.engine].script is None]
    with Source(folder, allow_pickle=job.model.allow_pickle) as source:
        if in_the_pass:
            done |= _Pass(job, folder, source, in_the_pass).run()
        for order in missing:
            if order not in in_the_pass:
                done[order.recipe.name] = _by_whole_engine(job, order, folder)
        return tuple(done[order.recipe.name] for order in job.orders), source.bytes


def _by_whole_engine(job: Job, order: Order, folder: Path) -> ArtifactMade:
    """An artifact that an engine makes in a process of its own; one that fails ends alone."""
    begun, tokens = time.monotonic(), None
    try:
        if order.recipe.calibrated:
            assert job.calibration is not None, "the plan refuses calibrated recipes without calibration data"
            tokens = calibration_tokens(job.calibration, load_tokenizer(folder, job.model))
        return whole.make(ENGINES[order.recipe.engine], job, order, folder, tokens)
    except Exception as error:
        return not_made(order, failure_alone(order, error), time.monotonic() - begun)


class _Pass:
    """One pass over one model; taken up where a killed attempt left it."""

    def __init__(self, job: Job, folder: Path, source: Source, orders: list[Order]) -> None:
        self._job = job
        self._source = source
        self._orders = orders
        self._streamed = open_model(job, folder, source)
        self._tokens = Tokens(job, folder, orders, self._streamed.dtype)
        self._makers: list[Maker] = []
        self._results: dict[str, ArtifactMade] = {}

    def run(self) -> dict[str, ArtifactMade]:
        """Make the artifacts of the orders; results by the recipe's name."""
        with locked_pass_folder(Path(self._job.workspace) / "passes" / self._tokens.digest) as folder:
            full = batching.micro_batch_tokens(self._streamed, self._tokens.longest)
            sizes = Sizes(full, self._tokens.longest, self._job.lean)
            attempts(folder, sizes, partial(self._attempt, folder, full), self._start_over)
            folder.clear()
        return self._results

    def _start_over(self) -> None:
        for maker in self._makers:
            maker.discard()
        self._makers, self._results = [], {}

    def _attempt(self, folder: PassFolder, full: int, state: PassState | None, size: int) -> None:
        if state is None:
            folder.clear()
        self._make_makers(folder, state)
        if size < full:
            for maker in self._makers:
                note_smaller(maker, size, full)
        try:
            self._go_through_layers(folder, state, size)
            for maker in list(self._makers):
                with self._failing(maker.order, maker), maker.timed():
                    self._results[maker.order.recipe.name] = maker.finish()
                    self._makers.remove(maker)
        except BaseException:
            # What was written stays for the next attempt; only the files are let go.
            for maker in self._makers:
                maker.release()
            raise

    def _make_makers(self, folder: PassFolder, state: PassState | None) -> None:
        for order in self._orders:
            name, print_ = order.recipe.name, order.fingerprint
            if state is not None and print_ in state.failed:
                self._results[name] = state.failed[print_]
                continue
            if state is not None and print_ not in state.makers:
                raise NotResumable(f"{name} is new")
            made_so_far = state.makers[print_] if state else None
            with self._failing(order, None):
                self._makers.append(self._maker(order, folder, made_so_far))

    def _maker(self, order: Order, folder: PassFolder, state: MakerState | None) -> Maker:
        place = folder.partial(order.fingerprint)
        made = maker_class(order.recipe)(self._job, order, self._streamed, self._source, place)
        try:
            made.begin(state)
        except FileNotFoundError as error:
            raise NotResumable(str(error)) from error
        return made

    def _go_through_layers(self, folder: PassFolder, state: PassState | None, size: int) -> None:
        with Streaming(self._streamed) as streaming:
            groups = self._groups(streaming, size)
            if state is not None and groups:
                folder.replay(state, groups)
            keeping = Keeping()
            for layer in streaming.layers(state.layers if state else 0):
                self._visit(layer, groups)
                if layer.index + 1 < len(self._streamed.layers) and keeping.worth_it():
                    with keeping.timed():
                        self._keep(folder, layer.index + 1, size, groups)
            if REFERENCE in groups:
                reference.store(self._tokens.place, groups[REFERENCE].outputs())

    def _groups(self, streaming: Streaming, size: int) -> dict[str, Lanes]:
        """The lanes that go through the model, by name."""
        found: dict[str, Lanes] = {}
        tokens, recipes = self._tokens.calibration, [maker.order.recipe for maker in self._makers]
        if tokens is not None and any(recipe.calibrated for recipe in recipes):
            found[CALIBRATION] = streaming.lanes(reference.micro_batches(tokens, size))
            if any(recipe.needs.folds for recipe in recipes):
                found[PROBE] = streaming.lanes([tokens[:1, :PROBE_TOKENS]])
            for recipe in recipes:
                if recipe.needs.own_stream:
                    found[own(recipe)] = streaming.lanes(reference.micro_batches(tokens, size))
        if not self._tokens.place.exists:
            found[REFERENCE] = streaming.lanes(reference.micro_batches(self._tokens.held_out, size))
        return found

    def _visit(self, layer: LoadedLayer, groups: dict[str, Lanes]) -> None:
        """Take one layer through everything: statistics, the reference, every maker."""
        observer, folds = None, list[Fold]()
        if CALIBRATION in groups:
            if PROBE in groups:
                folds = folds_of(self._streamed, layer, groups[PROBE])
                groups[PROBE].advance()
            observer = self._observer(maker.order.recipe for maker in self._makers)
            with observer.watch(self._streamed, layer.index), coarse_forwards():
                groups[CALIBRATION].advance()
            observer.check(layer.index)
        if REFERENCE in groups:
            groups[REFERENCE].advance()
        work = LayerWork(layer.index, layer.tensors, observer, folds)
        for maker in list(self._makers):
            lanes = groups.get(own(maker.order.recipe))
            with self._failing(maker.order, maker), maker.timed():
                if lanes is None:
                    maker.layer(work)
                else:
                    self._in_its_own_stream(maker, layer, lanes)
        for name in [name for name in groups if name.startswith(OWN)]:
            if name not in {own(maker.order.recipe) for maker in self._makers}:
                del groups[name]  # its recipe has failed

    def _observer(self, recipes: Iterable[Recipe]) -> Observer:
        assert self._job.calibration is not None
        return observer_of(self._job.calibration, magnitudes=any(recipe.needs.magnitudes for recipe in recipes))

    def _in_its_own_stream(self, maker: Maker, layer: LoadedLayer, lanes: Lanes) -> None:
        """Statistics from what the recipe's own quantized layers gave, and on through this one, quantized too."""
        observer = self._observer([maker.order.recipe])
        with observer.watch(self._streamed, layer.index), coarse_forwards():
            lanes.run_without_advancing()
        observer.check(layer.index)
        maker.layer(LayerWork(layer.index, layer.tensors, observer))
        self._streamed.free_layer(layer.index)
        self._streamed.load_layer(layer.index, {**layer.tensors, **maker.decoded})
        with coarse_forwards():
            lanes.advance()
        self._streamed.free_layer(layer.index)
        self._streamed.load_layer(layer.index, layer.tensors)

    def _keep(self, folder: PassFolder, layers: int, size: int, groups: dict[str, Lanes]) -> None:
        """Keep the state after a layer, if the model's layers allow it."""
        prints = {order.recipe.name: order.fingerprint for order in self._orders}
        try:
            state = PassState(
                layers=layers,
                micro_batch_tokens=size,
                makers={maker.order.fingerprint: maker.state() for maker in self._makers},
                failed={prints[name]: made for name, made in self._results.items()},
                groups={name: group_state(lanes, lanes.last_outputs()) for name, lanes in groups.items()},
            )
        except NotResumable:
            return
        folder.save(state, groups)

    @contextmanager
    def _failing(self, order: Order, maker: Maker | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failure = failure_alone(order, error)
            if maker is not None:
                self._makers.remove(maker)
                maker.discard()
            self._results[order.recipe.name] = not_made(order, failure, maker.seconds if maker else 0.0)
