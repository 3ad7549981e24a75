"""The streamed forward: all micro-batches go through the layers in lock step, one layer's weights in memory.

The model's own forward runs, each micro-batch in a greenlet of its own that rests before every decoder layer; so masks,
rotary embeddings and per-layer arguments are right for every architecture without a line about any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from workers.errors import UnsupportedModel
from workers.loading import StreamedModel
from workers.statistics import Observer

LayerVisitor = Callable[[int], None]


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

    Raises:
        UnsupportedModel: the model's forward doesn't run its layers one after the other, each once.
        CheckpointError: a tensor that a layer needs is missing.
    """
    if not streamed.outside_loaded:
        streamed.load_outside()
    with torch.inference_mode(), _resting_before(streamed.layers):
        lanes = [_Lane(streamed, batch) for batch in batches]
        try:
            return _in_lock_step(streamed, lanes, observer, observed, after_layer)
        finally:
            for lane in lanes:
                lane.end()


def _in_lock_step(
    streamed: StreamedModel,
    lanes: list[_Lane],
    observer: Observer | None,
    observed: int,
    after_layer: LayerVisitor | None,
) -> list[Tensor]:
    for lane in lanes:
        lane.go_on()
    for index in range(len(streamed.layers)):
        with _loaded(streamed, index):
            with ExitStack() as watching:
                if observer is not None:
                    watching.enter_context(observer.watch(streamed, index))
                for number, lane in enumerate(lanes):
                    if observer is not None:
                        observer.looking = number < observed
                    lane.require_before(index)
                    lane.go_on()
            if after_layer is not None:
                after_layer(index)
    return [lane.output() for lane in lanes[observed:]]


@contextmanager
def _loaded(streamed: StreamedModel, index: int) -> Iterator[None]:
    try:
        streamed.load_layer(index)
        yield
    finally:
        streamed.free_layer(index)


class _Lane:
    """One micro-batch on its way through the model's own forward."""

    def __init__(self, streamed: StreamedModel, batch: Tensor) -> None:
        self._streamed = streamed
        self._batch = batch.to(streamed.device)
        self._greenlet = greenlet(self._run)
        self._output: Tensor | None = None
        self._next: nn.Module | None = None

    def go_on(self) -> None:
        """Run until the next layer's door, or to the end."""
        self._next = self._greenlet.switch()

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


@contextmanager
def _resting_before(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Every layer gives way to the scheduler before it runs."""

    def rest(module: nn.Module, inputs: Any) -> None:
        parent = getcurrent().parent
        assert parent is not None, "a layer ran outside of its lane"
        parent.switch(module)

    handles = [layer.register_forward_pre_hook(rest) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Head:
    """Turns the decoder's output into logits by the model's own forward, head, scaling and capping included."""

    def __init__(self, streamed: StreamedModel) -> None:
        if not streamed.outside_loaded:
            streamed.load_outside()
        self._streamed = streamed

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, T, V] of the decoder's output [B, T, hidden], bit by bit those of the whole forward."""
        model, name = self._streamed.model, self._streamed.model.base_model_prefix
        base = model._modules[name]
        hidden = hidden_BTH.to(self._streamed.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        model._modules[name] = _Replay(hidden)
        try:
            with torch.inference_mode():
                logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            model._modules[name] = base
        return logits


class _Replay(nn.Module):
    """Stands in for the decoder, or for a part of it that the head calls by name, and returns what it returned."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self

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
