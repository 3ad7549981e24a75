"""Reads the next layer's tensors while the current layer computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from torch import Tensor

from workers.checkpoint.source import TensorSource

Group = TypeVar("Group")


class ReadAhead(Generic[Group]):
    """Reads groups of tensors in a thread, one group ahead of the last one taken.

    ``prepare`` makes of a group's tensors, by name, what is taken; it is called in the thread.
    """

    def __init__(
        self, source: TensorSource, groups: Sequence[Sequence[str]], prepare: Callable[[dict[str, Tensor]], Group]
    ) -> None:
        self._source = source
        self._groups = groups
        self._prepare = prepare
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[Group]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def take(self, index: int) -> Group:
        """A group; raises errors of reading and preparing it."""
        if self._next is None or self._next[0] != index:
            self._begin(index)
        assert self._next is not None
        group = self._next[1].result()
        self._next = None
        if index + 1 < len(self._groups):
            self._begin(index + 1)
        return group

    def _begin(self, index: int) -> None:
        self._next = (index, self._reader.submit(self._read, self._groups[index]))

    def _read(self, names: Sequence[str]) -> Group:
        return self._prepare({name: self._source.read(name) for name in names})
