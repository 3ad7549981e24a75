"""The streamed forward: all micro-batches go through the layers in lock step, one layer's weights in memory.

The model's own forward runs, each micro-batch in a greenlet of its own that rests before every decoder layer; so masks,
rotary embeddings and per-layer arguments are right for every architecture without a line about any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from workers.checkpoint.read_ahead import ReadAhead
from workers.errors import UnsupportedModel
from workers.model import trees
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer

LayerVisitor = Callable[[int], None]


@dataclass(frozen=True)
class LoadedLayer:
    """A layer whose weights are in memory; ``tensors`` are its checkpoint tensors as they were read."""

    index: int
    tensors: Mapping[str, Tensor]


class Streaming:
    """A model's layers, one after the other in memory, and the lanes that go through them.

    Raises:
        UnsupportedModel: the model's forward doesn't run its layers one after the other, each once.
        CheckpointError: a tensor that a layer needs is missing.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self._streamed = streamed
        self._stack = ExitStack()
        self._lanes: list[Lanes] = []

    def __enter__(self) -> Self:
        self._stack.enter_context(torch.inference_mode())
        for layer in self._streamed.layers:
            self._stack.enter_context(_pretending(layer))
            self._stack.callback(layer.register_forward_pre_hook(_rest, with_kwargs=True).remove)
            self._stack.callback(layer.register_forward_hook(_note_output).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lanes in self._lanes:
            lanes.end()
        self._stack.close()

    def lanes(self, batches: Sequence[Tensor]) -> Lanes:
        """Token batches (int64 [B, T] each) at the door of the first layer."""
        if not self._streamed.outside_loaded:
            self._streamed.load_outside()
        self._lanes.append(Lanes(self._streamed, batches))
        return self._lanes[-1]

    def layers(self, start: int = 0) -> Iterator[LoadedLayer]:
        """Load the layers from ``start`` on, one after the other; the next is read while the caller is at work.

        Without lanes they are only read.
        """
        streamed = self._streamed
        with ReadAhead(streamed.source, [streamed.keys_of_layer(i) for i in range(len(streamed.layers))]) as ahead:
            for index in range(start, len(streamed.layers)):
                tensors = ahead.take(index)
                if not self._lanes:
                    yield LoadedLayer(index, tensors)
                    continue
                try:
                    streamed.load_layer(index, tensors)
                    yield LoadedLayer(index, tensors)
                finally:
                    streamed.free_layer(index)


class Lanes:
    """Micro-batches on their way through the decoder, all at the same layer's door."""

    def __init__(self, streamed: StreamedModel, batches: Sequence[Tensor]) -> None:
        self._streamed = streamed
        self._lanes = [_Lane(streamed, batch) for batch in batches]
        self._at = 0
        self.device = streamed.device
        for lane in self._lanes:
            lane.go_on()

    def advance(self) -> None:
        """Take all through the layer that they rest before; its weights are in memory."""
        for lane in self._lanes:
            lane.require_before(self._at)
            lane.go_on()
        self._at += 1

    def run_without_advancing(self) -> None:
        """Run the layer on what waits at its door, for those who look on; nothing goes on."""
        for lane in self._lanes:
            lane.require_before(self._at)
            lane.run_without_advancing()

    def float32_run(self) -> Callable[[], Any]:
        """A function that runs the layer on what waits in the first lane: its output, and its arguments afterwards.

        All floats are float32, as the layer's own are to be while it's called.
        """
        lane = self._lanes[0]
        lane.require_before(self._at)
        return lane.run_in_float32

    def outputs(self) -> list[Tensor]:
        """The decoder's output for each batch, float [B, T, hidden] on the CPU, once all are through."""
        return [lane.output() for lane in self._lanes]

    def end(self) -> None:
        """Unwind lanes that stopped half way."""
        for lane in self._lanes:
            lane.end()

    # ---------------------------------------------------------------------- going on after a kill

    def last_outputs(self) -> list[Any]:
        """What the last layer returned, for each lane."""
        return [lane.last_output for lane in self._lanes]

    def next_inputs(self) -> list[Any]:
        """The arguments of the layer that comes next, for each lane; None at the end."""
        return [lane.inputs for lane in self._lanes]

    def replay(self, layers: int, last_outputs: Sequence[Any]) -> None:
        """Take all to the door of layer ``layers`` without computing: the last before it returns ``last_outputs``.

        The earlier ones return NaN, which must not be seen at the door: the caller looks there.
        """
        for lane, output in zip(self._lanes, last_outputs, strict=True):
            nothing = _poisoned(output)
            for index in range(layers):
                lane.require_before(index)
                lane.pretend(output if index == layers - 1 else nothing)
        self._at = layers


class _Lane:
    """One micro-batch on its way through the model's own forward."""

    def __init__(self, streamed: StreamedModel, batch: Tensor) -> None:
        self._streamed = streamed
        self._batch = batch.to(streamed.device)
        self._greenlet = _LaneGreenlet(self._run)
        self._output: Tensor | None = None
        self._next: nn.Module | None = None
        self.inputs: Any = None

    @property
    def last_output(self) -> Any:
        """What the last layer returned."""
        return self._greenlet.last_output

    def go_on(self) -> None:
        """Run until the next layer's door, or to the end."""
        self._next, self.inputs = self._greenlet.switch() or (None, None)

    def run_without_advancing(self) -> Any:
        """Run the layer on its arguments, and return what it returns; the lane stays where it is."""
        assert self._next is not None
        args, kwargs = self.inputs
        return self._next(*args, **kwargs)

    def run_in_float32(self) -> tuple[Any, Any]:
        """As ``run_without_advancing``, on the arguments in float32; they come back beside the output."""
        assert self._next is not None
        args, kwargs = _in_float32(self.inputs)
        return self._next(*args, **kwargs), (args, kwargs)

    def pretend(self, output: Any) -> None:
        """Go on as if the layer had returned ``output``."""
        self._greenlet.pretended = (output,)
        self.go_on()

    def require_before(self, index: int) -> None:
        """Refuse a forward that rests at the door of another layer, or has ended."""
        layers = self._streamed.layers
        if self._next is not layers[index]:
            found = "ends" if self._next is None else f"comes to layer {layers.index(self._next)}"
            raise self._unsupported(f"its forward {found} where layer {index} of {len(layers)} should come next")

    def output(self) -> Tensor:
        """The decoder's output, once the lane is through."""
        if self._output is None:
            raise self._unsupported("its forward comes to a layer again after the last")
        return self._output.to("cpu")

    def _unsupported(self, found: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"model {type(self._streamed.model).__name__}: {found} ({self._streamed.layers_name}); quantmill streams "
            "models whose forward runs each layer once, in order: leave it out of the zoo"
        )

    def end(self) -> None:
        """Unwind a lane that stopped half way."""
        if not self._greenlet.dead:
            self._greenlet.throw()

    def _run(self) -> None:
        output = self._streamed.base(input_ids=self._batch, use_cache=False)
        self._output = output[0]


class _LaneGreenlet(greenlet):  # type: ignore[misc]  # the library has no types
    """A greenlet with places for what the last layer returned in it, and for what the next is to return instead."""

    last_output: Any = None
    pretended: tuple[Any] | None = None


def _rest(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A layer in a lane gives way to the scheduler before it runs; called outside of the lanes, it runs."""
    parent = getcurrent().parent
    if parent is not None:
        parent.switch((module, (args, kwargs)))


@contextmanager
def _pretending(layer: nn.Module) -> Iterator[None]:
    """While the context lasts, the layer returns what its lane is to pretend, if there is such a thing.

    A module takes its ``forward`` before its hooks run, so that it can't be replaced while a lane rests in one.
    """
    plain = layer.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        lane = getcurrent()
        if isinstance(lane, _LaneGreenlet) and lane.pretended is not None:
            (output,), lane.pretended = lane.pretended, None
            return output
        return plain(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _note_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    lane = getcurrent()
    if isinstance(lane, _LaneGreenlet):
        lane.last_output = output


def _poisoned(output: Any) -> Any:
    """The same structure, its floats NaN."""
    return trees.mapped(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, output)


def _in_float32(value: Any) -> Any:
    """The same structure, its floats in float32."""
    return trees.mapped(lambda t: t.float() if t.is_floating_point() else t, value)


def stream(
    streamed: StreamedModel,
    batches: Sequence[Tensor],
    *,
    observer: Observer | None = None,
    observed: int = 0,
    after_layer: LayerVisitor | None = None,
) -> list[Tensor]:
    """Run token batches through the decoder, and return its output for each: the input of the head.

    ``batches``: int64 [B, T] each. The first ``observed`` of them are shown to ``observer``. ``after_layer(index)`` is
    called when all have passed a layer whose weights are still loaded. Returns float [B, T, hidden] on the CPU, one for
    each batch that isn't observed; observed ones are only for the statistics.

    Raises: as ``Streaming``.
    """
    with Streaming(streamed) as streaming:
        shown, others = streaming.lanes(batches[:observed]), streaming.lanes(batches[observed:])
        for layer in streaming.layers():
            if observer is not None:
                with observer.watch(streamed, layer.index):
                    shown.advance()
            else:
                shown.advance()
            others.advance()
            if after_layer is not None:
                after_layer(layer.index)
        return others.outputs()


class LogitsHead:
    """Turns the decoder's output into logits by the model's own forward, head, scaling and capping included."""

    def __init__(self, streamed: StreamedModel) -> None:
        if not streamed.outside_loaded:
            streamed.load_outside()
        self._streamed = streamed

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, T, V] of the decoder's output [B, T, hidden], bit by bit those of the whole forward."""
        model, name = self._streamed.model, self._streamed.base_name
        base = model._modules[name]
        hidden = hidden_BTH.to(self._streamed.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        model._modules[name] = _Replay(hidden, base)
        try:
            with torch.inference_mode():
                logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            model._modules[name] = base
        return logits


class _Replay(nn.Module):
    """Stands in for the decoder, or for a part of it that the head calls by name, and returns what it returned."""

    def __init__(self, hidden: Tensor, decoder: Any) -> None:
        super().__init__()
        self._hidden = hidden
        self.__dict__["_stands_for"] = decoder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_stands_for"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Replayed(self._hidden)


class _Replayed:
    """A decoder's output of which only the hidden states are there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
