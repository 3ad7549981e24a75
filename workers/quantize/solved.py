"""Separately solved layers of an artifact on disk: their tensors, fallbacks and seconds."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from workers.checkpoint.shards import Spooled, append
from workers.machine.files import read_model, write_text
from workers.spec.base import Frozen
from workers.spec.job import Failure


class SolvedLayer(Frozen):
    """One solved layer of one artifact: its tensors' positions in the layer's file, its fallbacks, its seconds."""

    tensors: tuple[Spooled, ...]
    fallbacks: tuple[str, ...]
    seconds: float


class SolvedFolder:
    """Folder of one artifact's solved layers; a layer is complete or absent."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, layer: int) -> bool:
        """Whether a layer is solved or has failed."""
        return self._record(layer).is_file() or self._failure(layer).is_file()

    def layer(self, layer: int) -> SolvedLayer | None:
        """A solved layer; None if it isn't solved."""
        stored = read_model(self._record(layer), SolvedLayer)
        if stored is None:
            return None
        file = str(self._tensors(layer))
        return stored.model_copy(update={"tensors": tuple(t.model_copy(update={"file": file}) for t in stored.tensors)})

    def failure(self) -> Failure | None:
        """Failure of the first layer that failed; None if none did."""
        first = min(self._path.glob("*.failed"), default=None)
        return None if first is None else Failure.model_validate_json(first.read_text())

    def writer(self, layer: int) -> LayerWriter:
        """Open a file for a layer's tensors."""
        self._path.mkdir(parents=True, exist_ok=True)
        return LayerWriter(self._tensors(layer))

    def note(self, layer: int, writer: LayerWriter, fallbacks: tuple[str, ...], seconds: float) -> None:
        """Record a layer as solved; its writer must be closed."""
        record = SolvedLayer(tensors=tuple(writer.tensors), fallbacks=fallbacks, seconds=seconds)
        write_text(self._record(layer), record.model_dump_json())

    def note_failure(self, layer: int, failure: Failure) -> None:
        """Record that this layer failed, and with it the artifact."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_text(self._failure(layer), failure.model_dump_json())

    def _tensors(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.tensors"

    def _record(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.json"

    def _failure(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.failed"


class LayerWriter:
    """Writes tensors into a partial file, which is renamed into place if the context ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._stream = self._partial.open("wb")
        self._end = 0
        self.tensors: list[Spooled] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream as stream:
            if kind is None:
                stream.flush()
                os.fsync(stream.fileno())
        if kind is None:
            self._partial.rename(self._path)
        else:
            self._partial.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, from any device."""
        entry = append(self._stream, self._end, name, tensor)
        self._end += entry.size
        self.tensors.append(entry)
