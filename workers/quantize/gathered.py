"""A layer's inputs on disk: what each part of a calibration has seen, and the statistics of all of it together.

Not the parts' sums are kept, but what is summed up: shown to an observer in the order of the text, it makes the very
bytes that one pass makes. Sums of sums would differ in their last bits, and then AWQ's search takes now and then
another exponent that is as good.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.shards import Spooled, read_back
from workers.model.folding import Fold, FoldKind
from workers.model.loading import InputName
from workers.model.statistics import InputWatcher
from workers.quantize.solved import LayerWriter
from workers.spec.base import Frozen


class Event(Frozen):
    """An input that came to a weight: a tensor of the file, by its number, or the one that came to ``leader``."""

    name: InputName
    tensor: int | None = None
    leader: InputName | None = None


class FoldHeader(Frozen):
    """A fold; its rows are a tensor of the file, by its number."""

    source: str
    kind: FoldKind
    expert: int | None
    sinks: tuple[InputName, ...]
    rows: int


class Log(Frozen):
    """What a part has seen of a layer, in the order in which it came."""

    tensors: tuple[Spooled, ...]
    events: tuple[Event, ...]
    folds: tuple[FoldHeader, ...]


class Recorder(InputWatcher):
    """Writes what comes to a layer's weights."""

    def __init__(self, writer: LayerWriter, *, all_tokens: bool) -> None:
        super().__init__(all_tokens=all_tokens)
        self._writer = writer
        self._events: list[Event] = []
        self._last: dict[str, tuple[Tensor, int]] = {}

    def take(self, name: InputName, inputs: Tensor) -> None:
        """Keep an input; experts that all see the same tokens share a tensor."""
        parameter, expert = name
        last = self._last.get(parameter)
        if last is None or expert is None or not _same(last[0], inputs):
            last = self._last[parameter] = (inputs, self._write(parameter, inputs))
        self._events.append(Event(name=name, tensor=last[1]))

    def share(self, name: InputName, leader: InputName) -> None:
        """Keep that it came."""
        self._events.append(Event(name=name, leader=leader))

    def log(self, folds: Iterable[Fold]) -> Log:
        """All that came, and the folds that were found in the layer."""
        self._last.clear()
        headers = tuple(
            FoldHeader(
                source=fold.source,
                kind=fold.kind,
                expert=fold.expert,
                sinks=fold.sinks,
                rows=self._write(fold.source, fold.rows_I),
            )
            for fold in folds
        )
        return Log(tensors=tuple(self._writer.tensors), events=tuple(self._events), folds=headers)

    def _write(self, name: str, tensor: Tensor) -> int:
        self._writer.add(name, tensor)
        return len(self._writer.tensors) - 1


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def replay(log: Log, tensors: Path, watcher: InputWatcher, device: str) -> list[Fold]:
    """Show a watcher what a part has seen, and return the folds that it found.

    Raises:
        FileNotFoundError: ``tensors`` isn't there.
    """
    with tensors.open("rb") as stream:
        for event in log.events:
            if event.leader is not None:
                watcher.share(event.name, event.leader)
            else:
                assert event.tensor is not None
                watcher.take(event.name, read_back(stream, log.tensors[event.tensor]).to(device))
        return [
            Fold(
                source=fold.source,
                kind=fold.kind,
                expert=fold.expert,
                rows_I=read_back(stream, log.tensors[fold.rows]).to(device),
                sinks=fold.sinks,
            )
            for fold in log.folds
        ]


def tensors_of(place: Path) -> Path:
    """The file of the tensors that a log names, beside the log."""
    return place.with_suffix(".tensors")
