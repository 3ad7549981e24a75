"""Streams micro-batches through a decoder in lock step, with one layer's weights in memory at a time.

The model's own forward runs, each micro-batch in its own greenlet (a lane) that pauses before every decoder layer; so
masks, rotary embeddings and per-layer arguments are right for every architecture without code for any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from workers.checkpoint.read_ahead import ReadAhead
from workers.errors import UnsupportedModel
from workers.machine.phase import tell
from workers.model import trees
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer
from workers.model.upload import LayerTensors, Upload
from workers.numerics.precision import coarse_forwards

# Token ids, int64 [B, T]; or what a processor prepared of one sequence, by the names that the model takes it by.
Batch = Tensor | Mapping[str, Tensor]
LayerVisitor = Callable[[int], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class LoadedLayer:
    """A layer whose weights are in memory, with its checkpoint tensors; ``others`` are those on further cards."""

    index: int
    tensors: LayerTensors
    others: Sequence[LayerTensors] = ()


class Streaming:
    """Loads a model's layers one after the other, and drives the lanes through them.

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
            self._stack.callback(layer.register_forward_pre_hook(_pause, with_kwargs=True).remove)
            self._stack.callback(layer.register_forward_hook(_note_output).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lanes in self._lanes:
            lanes.end()
        self._stack.close()

    def lanes(self, batches: Sequence[Batch]) -> Lanes:
        """Start lanes for batches: they are paused before the first layer."""
        if not self._streamed.outside_loaded:
            self._streamed.load_outside()
        self._lanes.append(Lanes(self._streamed, batches))
        return self._lanes[-1]

    def layers(self, start: int = 0) -> Iterator[LoadedLayer]:
        """Load the layers from ``start`` on, one after the other; the next is read and placed while the caller works.

        Without lanes, layers are only read, not loaded into the model.
        """
        streamed = self._streamed
        keys = [streamed.keys_of_layer(index) for index in range(len(streamed.layers))]
        with ReadAhead(streamed.source, keys, Upload(streamed.device)) as ahead:
            for index in range(start, len(streamed.layers)):
                tell(f"layer {index + 1} of {len(streamed.layers)}")
                tensors = ahead.take(index)
                tensors.wait()
                if not self._lanes:
                    yield LoadedLayer(index, tensors)
                    continue
                try:
                    streamed.load_layer(index, tensors.loaded)
                    yield LoadedLayer(index, tensors)
                finally:
                    streamed.free_layer(index)

    @contextmanager
    def replacing(self, layer: LoadedLayer, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the context lasts, the layer has these weights (by checkpoint key) instead of its own."""
        self._load_again(layer, {**layer.tensors.loaded, **weights})
        try:
            yield
        finally:
            self._load_again(layer, layer.tensors.loaded)

    def _load_again(self, layer: LoadedLayer, tensors: Mapping[str, Tensor]) -> None:
        self._streamed.free_layer(layer.index)
        self._streamed.load_layer(layer.index, tensors)

    def on_first(self, work: Callable[[], Found]) -> Found:
        """What ``work`` returns, in the thread of the first card: this one."""
        return work()


class Lanes:
    """Micro-batches on their way through the decoder, all paused before the same layer."""

    def __init__(self, streamed: StreamedModel, batches: Sequence[Batch]) -> None:
        self._streamed = streamed
        self._lanes = [_Lane(streamed, batch) for batch in batches]
        self._at = 0
        self.device = streamed.device
        for lane in self._lanes:
            lane.resume()

    def advance(self) -> None:
        """Run all micro-batches through the next layer, whose weights must be in memory."""
        for lane in self._lanes:
            lane.require_before(self._at)
            lane.resume()
        self._at += 1

    def advance_coarsely(self) -> None:
        """As ``advance``, for calibration (``coarse_forwards``)."""
        with coarse_forwards():
            self.advance()

    def observe(self, observer: Observer, *, advance: bool = True) -> Observer:
        """Run the next layer, in ``coarse_forwards``, with an observer of its inputs, which is returned.

        Without ``advance`` the micro-batches stay paused before the layer.
        """
        with observer.watch(self._streamed, self._at), coarse_forwards():
            if advance:
                self.advance()
            else:
                self._run_without_advancing()
        return observer

    def _run_without_advancing(self) -> None:
        for lane in self._lanes:
            lane.require_before(self._at)
            lane.run_without_advancing()

    def float32_run(self) -> Callable[[], Any]:
        """A function that runs the next layer on the first micro-batch, and returns its output and arguments.

        All floats are cast to float32, as the layer's own must be while the function is called.
        """
        lane = self._lanes[0]
        lane.require_before(self._at)
        return lane.run_in_float32

    def outputs(self) -> list[Tensor]:
        """The decoder's output for each batch, float [B, T, hidden] on the CPU, once all layers have run."""
        return [lane.output() for lane in self._lanes]

    def end(self) -> None:
        """Unwind lanes that are still paused."""
        for lane in self._lanes:
            lane.end()

    # -------------------------------------------------------------------------------------- resuming

    def last_outputs(self) -> list[Any]:
        """The output of the last layer that ran, for each lane."""
        return [lane.last_output for lane in self._lanes]

    def next_inputs(self) -> list[Any]:
        """The arguments of the next layer, for each lane; None at the end."""
        return [lane.inputs for lane in self._lanes]

    def replay(self, layers: int, last_outputs: Sequence[Any]) -> None:
        """Advance all lanes to layer ``layers`` without computing: the layer before it returns ``last_outputs``.

        Earlier layers return NaN. The caller checks ``next_inputs``, where no NaN may appear.
        """
        for lane, output in zip(self._lanes, last_outputs, strict=True):
            placeholder = _poisoned(output)
            for index in range(layers):
                lane.require_before(index)
                lane.pretend(output if index == layers - 1 else placeholder)
        self._at = layers


class _Lane:
    """One micro-batch in the model's own forward."""

    def __init__(self, streamed: StreamedModel, batch: Batch) -> None:
        self._streamed = streamed
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        self._batch = {
            name: value.to(streamed.device, streamed.dtype if value.is_floating_point() else None)
            for name, value in given.items()
        }
        self._greenlet = _LaneGreenlet(self._run)
        self._output: Tensor | None = None
        self._next: nn.Module | None = None
        self.inputs: Any = None

    @property
    def last_output(self) -> Any:
        """The output of the last layer that ran."""
        return self._greenlet.last_output

    def resume(self) -> None:
        """Run until the next layer is called, or to the end."""
        self._next, self.inputs = self._greenlet.switch() or (None, None)

    def run_without_advancing(self) -> Any:
        """Run the next layer on its arguments, and return its output; the lane stays paused."""
        assert self._next is not None
        args, kwargs = self.inputs
        return self._next(*args, **kwargs)

    def run_in_float32(self) -> tuple[Any, Any]:
        """Like ``run_without_advancing``, on the arguments cast to float32; returns the output and the arguments."""
        assert self._next is not None
        args, kwargs = _in_float32(self.inputs)
        return self._next(*args, **kwargs), (args, kwargs)

    def pretend(self, output: Any) -> None:
        """Resume as if the layer had returned ``output``."""
        self._greenlet.pretended = (output,)
        self.resume()

    def require_before(self, index: int) -> None:
        """Raise unless the lane is paused before layer ``index``.

        Raises:
            UnsupportedModel: the forward called another layer, or has ended.
        """
        layers = self._streamed.layers
        if self._next is not layers[index]:
            problem = "ends" if self._next is None else f"comes to layer {layers.index(self._next)}"
            raise self._unsupported(f"its forward {problem} where layer {index} of {len(layers)} should come next")

    def output(self) -> Tensor:
        """The decoder's output, once all layers have run."""
        if self._output is None:
            raise self._unsupported("its forward comes to a layer again after the last")
        return self._output.to("cpu")

    def _unsupported(self, problem: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"model {type(self._streamed.model).__name__}: {problem} ({self._streamed.layers_name}); quantmill streams "
            "models whose forward runs each layer once, in order: leave it out of the zoo"
        )

    def end(self) -> None:
        """Unwind a lane that is still paused."""
        if not self._greenlet.dead:
            self._greenlet.throw()

    def _run(self) -> None:
        output = self._streamed.base(**self._batch, use_cache=False)
        self._output = output[0]


class _LaneGreenlet(greenlet):  # type: ignore[misc]  # the library has no types
    """A greenlet with the last layer's output in it, and the output that the next layer returns without running."""

    last_output: Any = None
    pretended: tuple[Any] | None = None


def _pause(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-forward hook: pause the lane before its layer runs; outside of lanes, do nothing."""
    parent = getcurrent().parent
    if parent is not None:
        parent.switch((module, (args, kwargs)))


@contextmanager
def _pretending(layer: nn.Module) -> Iterator[None]:
    """While the context lasts, the layer returns its lane's ``pretended`` output, if set, without running.

    ``forward`` is wrapped beforehand: a module looks it up before its hooks run, so a hook can't replace it.
    """
    original = layer.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        lane = getcurrent()
        if isinstance(lane, _LaneGreenlet) and lane.pretended is not None:
            (output,), lane.pretended = lane.pretended, None
            return output
        return original(*args, **kwargs)

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
    """The same structure with all floats NaN."""
    return trees.mapped(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, output)


def _in_float32(value: Any) -> Any:
    """The same structure with all floats cast to float32."""
    return trees.mapped(lambda t: t.float() if t.is_floating_point() else t, value)


def stream(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    *,
    observer: Observer | None = None,
    observed: int = 0,
    after_layer: LayerVisitor | None = None,
) -> list[Tensor]:
    """Run token batches through the decoder, and return its outputs: the inputs of the head.

    ``batches``: token ids, int64 [B, T] each, or what a processor prepared. ``observer`` sees the first ``observed`` of
    them. ``after_layer(index)`` is called when all batches have passed a layer, with its weights still loaded. Returns
    float [B, T, hidden] on the CPU for each batch that isn't observed; observed batches only feed the statistics.

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
    """Computes logits from the decoder's output by the model's own forward, including head, scaling and capping."""

    def __init__(self, streamed: StreamedModel) -> None:
        if not streamed.outside_loaded:
            streamed.load_outside()
        self._streamed = streamed

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, T, V] of the decoder's output [B, T, hidden], bit-identical to those of the whole forward."""
        model, (outer, _, name) = self._streamed.model, self._streamed.base_name.rpartition(".")
        around = model.get_submodule(outer)
        base = around._modules[name]
        hidden = hidden_BTH.to(self._streamed.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        around._modules[name] = _Replay(hidden, base)
        try:
            with torch.inference_mode():
                logits: Tensor = self._streamed.language_model(input_ids=tokens, use_cache=False).logits
        finally:
            around._modules[name] = base
        return logits


class _Replay(nn.Module):
    """Replaces the decoder, or a submodule of it that the head calls by name, and returns the stored output."""

    def __init__(self, hidden: Tensor, decoder: Any) -> None:
        super().__init__()
        self._hidden = hidden
        self.__dict__["_stands_for"] = decoder

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_stands_for"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Replayed(self._hidden)


class _Replayed:
    """A decoder's output that has only hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
