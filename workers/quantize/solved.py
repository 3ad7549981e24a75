"""Layers of an artifact that were made by themselves, on disk: their tensors, and what there is to say of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from workers.checkpoint.shards import Spooled, append
from workers.machine.files import write_text
from workers.spec.base import Frozen
from workers.spec.job import Failure


class SolvedLayer(Frozen):
    """One layer of one artifact: where its tensors lie in its file, the fallbacks that it took, its seconds."""

    tensors: tuple[Spooled, ...]
    fallbacks: tuple[str, ...]
    seconds: float


class SolvedFolder:
    """The layers of one artifact that are there; each whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, layer: int) -> bool:
        """Whether a layer was made, or failed."""
        return self._record(layer).is_file() or self._failure(layer).is_file()

    def layer(self, layer: int) -> SolvedLayer | None:
        """A layer that was made; None if it wasn't."""
        record = self._record(layer)
        if not record.is_file():
            return None
        made = SolvedLayer.model_validate_json(record.read_text())
        file = str(self._tensors(layer))
        return made.model_copy(update={"tensors": tuple(t.model_copy(update={"file": file}) for t in made.tensors)})

    def failure(self) -> Failure | None:
        """Why the artifact can't be made, as the first layer that failed tells it; None if none did."""
        first = min(self._path.glob("*.failed"), default=None)
        return None if first is None else Failure.model_validate_json(first.read_text())

    def writer(self, layer: int) -> LayerWriter:
        """A file for a layer's tensors."""
        self._path.mkdir(parents=True, exist_ok=True)
        return LayerWriter(self._tensors(layer))

    def note(self, layer: int, writer: LayerWriter, fallbacks: tuple[str, ...], seconds: float) -> None:
        """The layer is made, and its writer is through."""
        made = SolvedLayer(tensors=tuple(writer.tensors), fallbacks=fallbacks, seconds=seconds)
        write_text(self._record(layer), made.model_dump_json())

    def note_failure(self, layer: int, failure: Failure) -> None:
        """The artifact can't be made because of this layer."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_text(self._failure(layer), failure.model_dump_json())

    def _tensors(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.tensors"

    def _record(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.json"

    def _failure(self, layer: int) -> Path:
        return self._path / f"{layer:05d}.failed"


class LayerWriter:
    """Writes tensors one after the other into a file, which is there once the context ends without an error."""

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
        """Write one tensor, of any device."""
        entry = append(self._stream, self._end, name, tensor)
        self._end += entry.size
        self.tensors.append(entry)
