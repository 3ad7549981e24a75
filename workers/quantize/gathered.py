"""Logs a layer's inputs on disk, for each part of a calibration, and replays them to compute the statistics.

The inputs are stored, not the parts' sums: replayed to an observer in the order of the text, they give the same bytes
as a single pass. Sums of partial sums differ in their last bits, and AWQ's search then sometimes picks another, equally
good exponent.
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
    """An input of a weight: a tensor of the file, by index, or the same input as ``leader``'s."""

    name: InputName
    tensor: int | None = None
    leader: InputName | None = None


class FoldHeader(Frozen):
    """A fold; ``rows`` is the index of its rows' tensor in the file."""

    source: str
    kind: FoldKind
    expert: int | None
    sinks: tuple[InputName, ...]
    rows: int


class Log(Frozen):
    """A part's inputs of one layer, in the order of arrival, and its folds."""

    tensors: tuple[Spooled, ...]
    events: tuple[Event, ...]
    folds: tuple[FoldHeader, ...]


class Recorder(InputWatcher):
    """Writes the inputs of a layer's weights to disk."""

    def __init__(self, writer: LayerWriter, *, all_tokens: bool) -> None:
        super().__init__(all_tokens=all_tokens)
        self._writer = writer
        self._events: list[Event] = []
        self._last: dict[str, tuple[Tensor, int]] = {}

    def take(self, name: InputName, inputs: Tensor) -> None:
        """Write an input; experts that see the same tokens share one tensor."""
        parameter, expert = name
        last = self._last.get(parameter)
        if last is None or expert is None or not _same(last[0], inputs):
            last = self._last[parameter] = (inputs, self._write(parameter, inputs))
        self._events.append(Event(name=name, tensor=last[1]))

    def share(self, name: InputName, leader: InputName) -> None:
        """Record an input that ``leader`` has already taken."""
        self._events.append(Event(name=name, leader=leader))

    def log(self, folds: Iterable[Fold]) -> Log:
        """All recorded events, and the folds of the layer."""
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
    """Replay a log to a watcher, and return the log's folds.

    Raises:
        FileNotFoundError: the file ``tensors`` doesn't exist.
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
                rows_I=read_back(stream, log.tensors[fold.rows]),
                sinks=fold.sinks,
            )
            for fold in log.folds
        ]


def tensors_of(log: Path) -> Path:
    """The tensor file of a log, beside it."""
    return log.with_suffix(".tensors")
