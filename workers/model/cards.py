"""Streams micro-batches through a decoder on several cards of this process, which compute at the same time.

Each card has a copy of the layer at work, its share of the micro-batches, and a thread: lanes are greenlets, which stay
in the thread that made them. A layer is read from the disk once. Statistics of all cards are summed on the first, in
the order of the cards: the same number of cards gives the same bytes, another number other last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from workers.checkpoint.read_ahead import ReadAhead
from workers.machine.phase import tell
from workers.model import trees
from workers.model.forward import Batch, Found, Lanes, LoadedLayer, Streaming
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer
from workers.model.upload import LayerTensors, Uploads
from workers.numerics.precision import compute_exactly


class CardThread:
    """A thread that computes on one card: ``cuda`` means this card there. It runs one thing after the other."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._executor = ThreadPoolExecutor(1, f"card-{index}", self._begin)

    def _begin(self) -> None:
        torch.cuda.set_device(self.device)
        compute_exactly()

    def submit(self, work: Callable[[], Found]) -> Future[Found]:
        """Have the thread run ``work``, in inference mode."""
        return self._executor.submit(_in_inference_mode, work)

    def end(self) -> None:
        """End the thread, once it has run what it is at."""
        self._executor.shutdown(cancel_futures=True)


def _in_inference_mode(work: Callable[[], Found]) -> Found:
    with torch.inference_mode():  # a setting of each thread
        return work()


def all_of(futures: Iterable[Future[Found]]) -> list[Found]:
    """The results of all futures, once none is at work any more; raises the first error."""
    futures = list(futures)
    wait(futures)
    return [future.result() for future in futures]


class CardStreaming:
    """As ``forward.Streaming``, on as many cards as models, which are one model, each on its card.

    Makers work on the ``threads``; a maker that has several cards divides its layer's problems among their ``solvers``,
    threads beside them.

    Raises: as ``Streaming``.
    """

    def __init__(self, models: Sequence[StreamedModel]) -> None:
        self._models = models
        self._streamings = [Streaming(model) for model in models]
        self.threads = [CardThread(index) for index in range(len(models))]
        self.solvers = [CardThread(index) for index in range(len(models))]
        self._lanes: list[CardLanes] = []

    def __enter__(self) -> Self:
        # Torch loads its linear algebra when it is first used, which fails in two threads at a time (pytorch#90613).
        torch.linalg.cholesky(torch.eye(1, device=self.threads[0].device))
        for thread, streaming in zip(self.threads, self._streamings, strict=True):
            thread.submit(streaming.__enter__).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            all_of(
                thread.submit(partial(streaming.__exit__, kind, error, trace))
                for thread, streaming in zip(self.threads, self._streamings, strict=True)
            )
        finally:
            for thread in (*self.threads, *self.solvers):
                thread.end()

    def lanes(self, batches: Sequence[Batch]) -> CardLanes:
        """Start lanes for batches, in turn on each card: they are paused before the first layer."""
        # One card after the other: transformers' loader isn't made for several threads.
        parts = [
            thread.submit(partial(streaming.lanes, batches[index :: len(self.threads)])).result()
            for index, (thread, streaming) in enumerate(zip(self.threads, self._streamings, strict=True))
        ]
        self._lanes.append(CardLanes(self.threads, self._models, parts))
        return self._lanes[-1]

    def layers(self, start: int = 0) -> Iterator[LoadedLayer]:
        """As ``Streaming.layers``: each layer is read once, and placed on all cards."""
        first = self._models[0]
        count = len(first.layers)
        keys = [first.keys_of_layer(index) for index in range(count)]
        with ReadAhead(first.source, keys, Uploads([str(thread.device) for thread in self.threads])) as ahead:
            for index in range(start, count):
                tell(f"layer {index + 1} of {count}")
                copies = ahead.take(index)
                for thread, tensors in zip(self.threads, copies, strict=True):
                    thread.submit(tensors.wait).result()
                layer = LoadedLayer(index, copies[0], copies[1:])
                try:
                    if self._lanes:
                        self._load(layer, {})
                    yield layer
                finally:
                    if self._lanes:
                        for model in self._models:
                            model.free_layer(index)

    @contextmanager
    def replacing(self, layer: LoadedLayer, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the context lasts, the layer has these weights (by checkpoint key) instead of its own on all cards."""
        self._load(layer, weights)
        try:
            yield
        finally:
            self._load(layer, {})

    def _load(self, layer: LoadedLayer, weights: Mapping[str, Tensor]) -> None:
        """Load a layer on all cards, one after the other: transformers' loader isn't made for several threads."""
        for thread, model, own in zip(self.threads, self._models, (layer.tensors, *layer.others), strict=True):
            model.free_layer(layer.index)
            thread.submit(partial(_load, model, layer.index, own, weights, thread.device)).result()

    def on_first(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns, in the thread of the first card."""
        return self.threads[0].submit(work).result()


def _load(
    model: StreamedModel, index: int, own: LayerTensors, weights: Mapping[str, Tensor], device: torch.device
) -> None:
    model.load_layer(index, {**own.loaded, **{key: tensor.to(device) for key, tensor in weights.items()}})


class CardLanes:
    """As ``forward.Lanes``, on several cards: micro-batch i is on card i modulo their number."""

    # Of the outputs that ``replay`` is given.
    device = "cpu"

    def __init__(self, threads: Sequence[CardThread], models: Sequence[StreamedModel], parts: Sequence[Lanes]) -> None:
        self._threads, self._models, self._parts = threads, models, parts
        self._at = 0

    def _each(self, work: Callable[[int], Found]) -> list[Found]:
        """The results of ``work(card)`` of all cards, which compute at the same time; raises the first card's error."""
        return all_of(thread.submit(partial(work, index)) for index, thread in enumerate(self._threads))

    def advance(self) -> None:
        """Run all micro-batches through the next layer, whose weights must be in the cards' memory."""
        self._each(lambda card: self._parts[card].advance())
        self._at += 1

    def advance_coarsely(self) -> None:
        """As ``Lanes.advance_coarsely``."""
        self._each(lambda card: self._parts[card].advance_coarsely())
        self._at += 1

    def observe(self, observer: Observer, *, advance: bool = True) -> Observer:
        """As ``Lanes.observe``: each card's inputs are gathered there, and summed by ``observer`` on the first."""
        observers = [observer, *(observer.anew() for _ in self._threads[1:])]
        self._each(lambda card: self._parts[card].observe(observers[card], advance=advance))
        inputs = observer.inputs(self._models[0], self._at)
        device = self._threads[0].device
        for other in observers[1:]:
            self._threads[0].submit(partial(observer.add, other, inputs, device)).result()
        if advance:
            self._at += 1
        return observer

    def float32_run(self) -> Callable[[], Any]:
        """As ``Lanes.float32_run``; to be called in the thread of the first card."""
        return self._parts[0].float32_run()

    def outputs(self) -> list[Tensor]:
        """The decoder's output for each batch, float [B, T, hidden] on the CPU, once all layers have run."""
        return _in_order(self._each(lambda card: self._parts[card].outputs()))

    # -------------------------------------------------------------------------------------- resuming

    def last_outputs(self) -> list[Any]:
        """The output of the last layer that ran, for each lane, on its card."""
        return _in_order([part.last_outputs() for part in self._parts])

    def next_inputs(self) -> list[Any]:
        """The arguments of the next layer, for each lane, on its card; None at the end."""
        return _in_order([part.next_inputs() for part in self._parts])

    def replay(self, layers: int, last_outputs: Sequence[Any]) -> None:
        """As ``Lanes.replay``; the outputs are moved to their lanes' cards."""

        def replay(card: int) -> None:
            there = [_moved(output, self._threads[card].device) for output in last_outputs[card :: len(self._parts)]]
            self._parts[card].replay(layers, there)

        self._each(replay)
        self._at = layers


def _moved(output: Any, device: torch.device) -> Any:
    return trees.mapped(lambda tensor: tensor.to(device), output)


def _in_order(parts: Sequence[Sequence[Found]]) -> list[Found]:
    """The lanes' items in the order of the lanes, from each card's."""
    cards = len(parts)
    return [parts[index % cards][index // cards] for index in range(sum(map(len, parts)))]


AnyStreaming = Streaming | CardStreaming
AnyLanes = Lanes | CardLanes


def streaming_on(models: Sequence[StreamedModel]) -> AnyStreaming:
    """Streams a model where it is opened: on the CPU, on one card, or on several."""
    return Streaming(models[0]) if len(models) == 1 else CardStreaming(models)
