"""The quantize stage: one pass over a model's weights makes its reference and all of its artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from workers import reference
from workers.calibration import calibration_tokens, held_out_tokens, load_tokenizer
from workers.checkpoint import Source
from workers.forward import stream
from workers.job import ArtifactMade, Job, Order, artifact_folder
from workers.loading import StreamedModel
from workers.makers import Maker, record_path
from workers.recipes import BitsAndBytesRecipe, Recipe
from workers.run import describe
from workers.statistics import Observer


def compute_device() -> tuple[str, torch.dtype | None]:
    """Where to compute and in which dtype: a GPU in the checkpoint's own (None), a CPU in float32."""
    return ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)


def checkpoint_dtype(source: Source) -> torch.dtype:
    """The floating dtype that most of a checkpoint's matrices have."""
    counts: dict[torch.dtype, int] = {}
    for header in source.headers.values():
        if header.dtype.is_floating_point and len(header.shape) > 1:
            counts[header.dtype] = counts.get(header.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def quantize(job: Job, folder: Path) -> tuple[tuple[ArtifactMade, ...], int]:
    """Make a job's artifacts that aren't there yet; return all of them, and the bytes of the source's weights.

    An artifact that fails is returned with its error; the others are made all the same.

    Raises:
        QuantmillError: what fails all of them: the model, the calibration text, the device.
    """
    done = {order.recipe.name: made for order in job.orders if (made := _made_before(job, order))}
    with Source(folder, allow_pickle=job.model.allow_pickle) as source:
        missing = [order for order in job.orders if order.recipe.name not in done]
        if missing:
            done |= _Pass(job, folder, source).run(missing)
        return tuple(done[order.recipe.name] for order in job.orders), source.bytes


def _made_before(job: Job, order: Order) -> ArtifactMade | None:
    place = artifact_folder(job.workspace, order)
    record = record_path(place)
    if not place.is_dir() or not record.is_file():
        return None
    return ArtifactMade.model_validate_json(record.read_text())


def _maker_class(recipe: Recipe) -> type[Maker]:
    """The maker for a recipe; a library is only imported where a recipe needs it."""
    if isinstance(recipe, BitsAndBytesRecipe):
        from workers.bnb_maker import BitsAndBytesMaker

        return BitsAndBytesMaker
    from workers.int_maker import IntMaker

    return IntMaker


class _Pass:
    """One pass over one model."""

    def __init__(self, job: Job, folder: Path, source: Source) -> None:
        device, dtype = compute_device()
        self._job = job
        self._folder = folder
        self._source = source
        self._dtype = dtype or checkpoint_dtype(source)
        self._streamed = StreamedModel(
            folder, source, dtype=self._dtype, device=device, trust_remote_code=job.model.trust_remote_code
        )
        self._makers: list[Maker] = []
        self._results: dict[str, ArtifactMade] = {}

    def run(self, orders: list[Order]) -> dict[str, ArtifactMade]:
        """Make the artifacts of the orders; results by the recipe's name."""
        for order in orders:
            with self._failing(order, None):
                self._makers.append(_maker_class(order.recipe)(self._job, order, self._streamed, self._source))
        try:
            self._go_through_layers()
            for maker in list(self._makers):
                with self._failing(maker.order, maker), maker.timed():
                    self._results[maker.order.recipe.name] = maker.finish()
        finally:
            for maker in self._makers:
                maker.discard()
        return self._results

    def _go_through_layers(self) -> None:
        calibrated = any(maker.order.recipe.calibrated for maker in self._makers)
        tokenizer = load_tokenizer(self._folder, self._job.model)
        held_out = held_out_tokens(self._job.verification, tokenizer)
        place = reference.place_of(self._job, held_out, self._dtype)
        if not self._makers or (place.exists and not calibrated):
            for index in range(len(self._streamed.layers)):
                self._visit(index, None)
            return
        batches: list[Tensor] = []
        if calibrated:
            assert self._job.calibration is not None
            batches = reference.micro_batches(calibration_tokens(self._job.calibration, tokenizer))
        observed = len(batches)
        if not place.exists:
            batches = [*batches, *reference.micro_batches(held_out)]
        observer = Observer() if observed else None
        hidden = stream(
            self._streamed, batches, observer=observer, observed=observed, after_layer=self._visitor(observer)
        )
        if hidden:
            reference.store(place, hidden)

    def _visitor(self, observer: Observer | None) -> Callable[[int], None]:
        def visit(index: int) -> None:
            if observer is not None:
                observer.check(index)
            self._visit(index, observer)

        return visit

    def _visit(self, index: int, observer: Observer | None) -> None:
        for maker in list(self._makers):
            with self._failing(maker.order, maker), maker.timed():
                maker.layer(index, observer)

    @contextmanager
    def _failing(self, order: Order, maker: Maker | None) -> Iterator[None]:
        """An artifact's error ends that artifact alone. Memory and disk are everybody's: those errors go on upwards."""
        try:
            yield
        except (MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if maker is not None:
                self._makers.remove(maker)
                maker.discard()
            self._results[order.recipe.name] = ArtifactMade(
                recipe=order.recipe.name,
                path="",
                bytes=0,
                seconds=maker.seconds if maker else 0.0,
                error=describe(error),
            )
