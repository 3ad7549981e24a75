"""Runs the quantize stage: one pass over a model's weights computes its reference and all of its artifacts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from workers.checkpoint.source import ModelSource
from workers.engines import whole
from workers.engines.maker import Maker, MakerState
from workers.engines.table import maker_class
from workers.formats.kept import open_source
from workers.model import batching, reference
from workers.model.cards import AnyLanes, AnyStreaming, streaming_on
from workers.model.device import open_models
from workers.model.folding import Fold
from workers.model.forward import LoadedLayer
from workers.model.statistics import InputStatistics, Observer
from workers.model.text import calibration_tokens, load_tokenizer
from workers.quantize.attempts import (
    CheckpointTimer,
    Sizes,
    attempts,
    failed_artifact,
    failure_alone,
    note_data,
    note_smaller,
)
from workers.quantize.inputs import (
    CALIBRATION,
    OWN,
    PROBE,
    REFERENCE,
    Tokens,
    existing_artifacts,
    folds_of,
    observer_of,
    own_stream,
)
from workers.quantize.resume import NotResumable, PassFolder, PassState, group_state, locked_pass_folder
from workers.quantize.solving import by_one, outcomes
from workers.spec.engines import ENGINES
from workers.spec.job import ArtifactMade, ExpertTokens, Job, Order
from workers.spec.recipes import Recipe


def quantize(job: Job, folder: Path) -> tuple[tuple[ArtifactMade, ...], int]:
    """Make a job's missing artifacts; return all of them, and the size of the source's weights in bytes.

    A failed artifact is returned with its error and doesn't stop the others.

    Raises:
        QuantmillError: an error that concerns all artifacts: the model, the calibration text, the device.
    """
    done, missing = existing_artifacts(job)
    in_the_pass = [order for order in missing if ENGINES[order.recipe.engine].script is None]
    with open_source(folder, job.model) as source:
        if in_the_pass:
            done |= _Pass(job, folder, source, in_the_pass).run()
        for order in missing:
            if order not in in_the_pass:
                done[order.recipe.name] = _by_whole_engine(job, order, folder)
        return tuple(done[order.recipe.name] for order in job.orders), source.bytes


def _by_whole_engine(job: Job, order: Order, folder: Path) -> ArtifactMade:
    """Make an artifact by an engine in its own process; its failure doesn't stop the others."""
    begun, tokens = time.monotonic(), None
    try:
        if order.recipe.calibrated:
            assert job.calibration is not None, "the plan refuses calibrated recipes without calibration data"
            # The zoo refuses pictures, and sequences of different lengths, for engines that make whole artifacts.
            (tokens,) = calibration_tokens(job.calibration, load_tokenizer(folder, job.model)).groups
        return whole.make(ENGINES[order.recipe.engine], job, order, folder, tokens)
    except Exception as error:
        return failed_artifact(order, failure_alone(order, error), time.monotonic() - begun)


class _Pass:
    """One pass over one model; resumes from a killed attempt's checkpoint."""

    def __init__(self, job: Job, folder: Path, source: ModelSource, orders: list[Order]) -> None:
        self._job = job
        self._source = source
        self._orders = orders
        self._models = open_models(job, folder, source)
        self._streamed = self._models[0]
        self._tokens = Tokens(job, folder, orders, self._streamed.dtype, self._streamed.embedding_rows)
        self._makers: list[Maker] = []
        self._results: dict[str, ArtifactMade] = {}

    def run(self) -> dict[str, ArtifactMade]:
        """Make the artifacts of the orders; results by recipe name."""
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
        for maker in self._makers:
            note_data(maker, self._tokens.notes)
            if size < full:
                note_smaller(maker, size, full)
        try:
            self._go_through_layers(folder, state, size)
            for maker in list(self._makers):
                with self._failing(maker.order, maker), maker.timed():
                    self._results[maker.order.recipe.name] = maker.finish()
                    self._makers.remove(maker)
        except BaseException:
            # Files are closed but not deleted: the next attempt resumes from them.
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
            maker_state = state.makers[print_] if state else None
            with self._failing(order, None):
                self._makers.append(self._maker(order, folder, maker_state))

    def _maker(self, order: Order, folder: PassFolder, state: MakerState | None) -> Maker:
        partial_folder = folder.partial(order.fingerprint)
        maker = maker_class(order.recipe)(self._job, order, self._streamed, self._source, partial_folder)
        maker.cards = len(self._models)
        try:
            maker.begin(state)
        except (OSError, ValueError) as error:
            if state is None:
                raise
            raise NotResumable(str(error)) from error
        return maker

    def _go_through_layers(self, folder: PassFolder, state: PassState | None, size: int) -> None:
        with streaming_on(self._models) as streaming:
            groups = self._groups(streaming, size)
            if state is not None and groups:
                folder.replay(state, groups)
            timer = CheckpointTimer()
            for layer in streaming.layers(state.layers if state else 0):
                self._visit(streaming, layer, groups)
                if layer.index + 1 < len(self._streamed.layers) and timer.due():
                    with timer.timed():
                        self._checkpoint(folder, layer.index + 1, size, groups)
            if REFERENCE in groups:
                reference.store(self._tokens.reference, groups[REFERENCE].outputs())
            if CALIBRATION in groups and any(maker.order.recipe.needs.final for maker in self._makers):
                final = InputStatistics.of(groups[CALIBRATION].outputs(), self._streamed.device)
                for maker in self._makers:
                    maker.final = final

    def _groups(self, streaming: AnyStreaming, size: int) -> dict[str, AnyLanes]:
        """The groups of lanes that run through the model, by name."""
        groups: dict[str, AnyLanes] = {}
        recipes = [maker.order.recipe for maker in self._makers]
        if self._tokens.calibrates and any(recipe.calibrated for recipe in recipes):
            groups[CALIBRATION] = streaming.lanes(self._tokens.calibration_batches(size))
            if any(recipe.needs.folds for recipe in recipes):
                groups[PROBE] = streaming.lanes([self._tokens.probe])
            for recipe in recipes:
                if recipe.needs.own_stream:
                    groups[own_stream(recipe)] = streaming.lanes(self._tokens.calibration_batches(size))
        if not self._tokens.reference.exists:
            groups[REFERENCE] = streaming.lanes(self._tokens.held_out.batches(size))
        return groups

    def _visit(self, streaming: AnyStreaming, layer: LoadedLayer, groups: dict[str, AnyLanes]) -> None:
        """Run one layer: statistics, the reference, every maker."""
        observer, folds = None, list[Fold]()
        if CALIBRATION in groups:
            if PROBE in groups:
                folds = streaming.on_first(partial(folds_of, self._streamed, layer, groups[PROBE]))
                groups[PROBE].advance()
            observer = groups[CALIBRATION].observe(self._observer(maker.order.recipe for maker in self._makers))
            observer.check(layer.index)
            self._count_tokens(layer.index, observer.tokens_of_experts())
        if REFERENCE in groups:
            groups[REFERENCE].advance()
        together = [maker for maker in self._makers if own_stream(maker.order.recipe) not in groups]
        ended = dict(zip(together, outcomes(streaming, layer, observer, folds, together), strict=True))
        for maker in list(self._makers):
            with self._failing(maker.order, maker):
                if maker in ended:
                    ended[maker]()
                else:
                    self._in_its_own_stream(streaming, maker, layer, groups[own_stream(maker.order.recipe)])
        for name in [name for name in groups if name.startswith(OWN)]:
            if name not in {own_stream(maker.order.recipe) for maker in self._makers}:
                del groups[name]  # its recipe has failed

    def _count_tokens(self, layer: int, counts: Sequence[int]) -> None:
        """Note how many tokens came to the experts of a layer, in ascending order."""
        if not counts:
            return
        found = ExpertTokens(
            layer=layer, experts=len(counts), least=counts[0], median=counts[len(counts) // 2], most=counts[-1]
        )
        for maker in self._makers:
            if maker.order.recipe.calibrated:
                maker.expert_tokens.append(found)

    def _observer(self, recipes: Iterable[Recipe]) -> Observer:
        assert self._job.calibration is not None
        return observer_of(self._job.calibration, recipes)

    def _in_its_own_stream(self, streaming: AnyStreaming, maker: Maker, layer: LoadedLayer, lanes: AnyLanes) -> None:
        """Take statistics on the recipe's own quantized activations, then run this layer quantized, too."""
        with maker.timed():
            observer = lanes.observe(self._observer([maker.order.recipe]), advance=False)
            observer.check(layer.index)
        by_one(streaming, layer, observer, maker)
        with maker.timed(), streaming.replacing(layer, maker.decoded):
            lanes.advance_coarsely()

    def _checkpoint(self, folder: PassFolder, layers: int, size: int, groups: dict[str, AnyLanes]) -> None:
        """Checkpoint the pass after a layer, if the layer returns only tensors."""
        prints = {order.recipe.name: order.fingerprint for order in self._orders}
        try:
            state = PassState(
                layers=layers,
                micro_batch_tokens=size,
                makers={maker.order.fingerprint: maker.state() for maker in self._makers},
                failed={prints[name]: artifact for name, artifact in self._results.items()},
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
            self._results[order.recipe.name] = failed_artifact(order, failure, maker.seconds if maker else 0.0)
