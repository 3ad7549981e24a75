"""Writes an artifact's shards tensor by tensor: nothing accumulates in memory, and a killed writer can resume.

Tensors are appended to a spool file. A full spool becomes a safetensors shard: header first, then the data in the
format's canonical order (descending dtype size, then name), copied inside the kernel. ``close`` renames all shards once
their number is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from workers.checkpoint.source import DTYPES, INDEX
from workers.machine.files import write_text
from workers.spec.base import Frozen
from workers.spec.workspace import MAX_SHARD_BYTES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Headers are padded to a multiple of this many bytes, as by the format's own writer, so that tensors can be mapped.
ALIGNMENT = 8


class Spooled(Frozen):
    """A tensor in a file, with its position in bytes. ``file`` is None in the writer's own spool."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    file: str | None = None


class Journal(Frozen):
    """A writer's state on disk: tensor names of the complete shards, and the spool of the next shard."""

    shards: tuple[tuple[str, ...], ...] = ()
    spool: tuple[Spooled, ...] = ()
    total_bytes: int = 0


class ShardWriter:
    """Writes tensors into shards of bounded size, in the order of adding; file names follow the Hub's conventions.

    Leaving the context without ``close`` removes everything written.
    """

    # The library whose tensors these are, in the files' metadata.
    framework = "pt"

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, journal: Journal | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        journal = journal or Journal()
        self._folder = folder
        self._limit = max_shard_bytes
        self._shards = list(journal.shards)
        self._spooled = list(journal.spool)
        self._names = {name for shard in self._shards for name in shard} | {entry.name for entry in self._spooled}
        self._shard_bytes = sum(entry.size for entry in self._spooled)
        self._spool_bytes = sum(entry.size for entry in self._spooled if entry.file is None)
        self.total_bytes = journal.total_bytes
        self._spool: BinaryIO | None = None
        # Spools of complete shards: the last saved journal may still name them, so they are kept until the next one.
        self._spent: list[Path] = []
        self._spent_before: list[Path] = []
        self._discard_after(journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        for path in (*self._folder.glob(".shard-*.partial"), *self._folder.glob(".shard-*.spool")):
            path.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, from any device, by copying it to the host."""
        self._make_room(name, tensor.numel() * tensor.element_size())
        entry = append(self._open_spool(), self._spool_bytes, name, tensor)
        self._spool_bytes += entry.size
        self._take(entry)

    def adopt(self, entries: Iterable[Spooled]) -> None:
        """Append tensors stored in other files, in their order; these files must exist until ``close``."""
        for entry in entries:
            assert entry.file is not None
            self._make_room(entry.name, entry.size)
            self._take(entry)

    def _make_room(self, name: str, size: int) -> None:
        assert name not in self._names, f"{name} was written twice"
        if self._spooled and self._shard_bytes + size > self._limit:
            self._finish_shard()

    def _take(self, entry: Spooled) -> None:
        self._spooled.append(entry)
        self._names.add(entry.name)
        self._shard_bytes += entry.size
        self.total_bytes += entry.size

    def journal(self) -> Journal:
        """Flush to disk, and return the state: a writer created from it continues after the last tensor in it.

        Keep the previous journal until this one is saved.
        """
        if self._spool is not None:
            self._spool.flush()
            os.fsync(self._spool.fileno())
        for path in self._spent_before:
            path.unlink(missing_ok=True)
        self._spent_before, self._spent = self._spent, []
        return Journal(shards=tuple(self._shards), spool=tuple(self._spooled), total_bytes=self.total_bytes)

    def close(self) -> None:
        """Write the last shard, and rename all shards to their final names."""
        self._finish_shard()
        for path in (*self._spent_before, *self._spent):
            path.unlink(missing_ok=True)
        count = len(self._shards)
        if count == 1:
            self._partial(0).rename(self._folder / "model.safetensors")
            return
        files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, file in enumerate(files):
            self._partial(number).rename(self._folder / file)
        placed = {name: file for names, file in zip(self._shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(placed.items()))}
        write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def release(self) -> None:
        """Close the open file; written files stay."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _partial(self, number: int) -> Path:
        return self._folder / f".shard-{number:05d}.partial"

    def _spool_path(self) -> Path:
        return self._folder / f".shard-{len(self._shards):05d}.spool"

    def _open_spool(self) -> BinaryIO:
        if self._spool is None:
            self._spool = self._spool_path().open("ab")
        return self._spool

    def _discard_after(self, journal: Journal) -> None:
        """Remove everything that a killed writer wrote after its journal.

        Raises:
            FileNotFoundError: a file that the journal names is missing.
        """
        journaled = {self._partial(number) for number in range(len(journal.shards))}
        missing = next((path for path in journaled if not path.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{missing}: named in a journal, but not there")
        if self._spool_bytes:
            journaled.add(self._spool_path())
            if self._spool_path().stat().st_size < self._spool_bytes:
                raise FileNotFoundError(f"{self._spool_path()}: shorter than its journal says")
            os.truncate(self._spool_path(), self._spool_bytes)
        for path in (*self._folder.glob(".shard-*.partial"), *self._folder.glob(".shard-*.spool")):
            if path not in journaled:
                path.unlink()

    def _finish_shard(self) -> None:
        self.release()
        number, spool = len(self._shards), self._spool_path()
        spool.touch()
        entries = sorted(self._spooled, key=lambda entry: (-_itemsize(entry), entry.name))
        with ExitStack() as stack:
            target = stack.enter_context(self._partial(number).open("wb"))
            target.write(_header(entries, self.framework))
            target.flush()
            sources: dict[str | None, BinaryIO] = {}
            for entry in entries:
                if entry.file not in sources:
                    sources[entry.file] = stack.enter_context(Path(entry.file or spool).open("rb"))
                _copy(sources[entry.file], target, entry.start, entry.size)
            os.fsync(target.fileno())
        self._shards.append(tuple(entry.name for entry in self._spooled))
        self._spooled, self._shard_bytes, self._spool_bytes = [], 0, 0
        self._spent.append(spool)


def append(stream: BinaryIO, start: int, name: str, tensor: Tensor) -> Spooled:
    """Write a tensor, from any device, at the end of a stream; ``start`` is the stream's position in bytes."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    stream.write(data.numpy().data)
    shape = tuple(tensor.shape)
    return Spooled(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=shape, start=start, size=data.numel())


def read_back(stream: BufferedReader, entry: Spooled) -> Tensor:
    """Read a tensor written by ``append``, to the CPU.

    Raises:
        OSError: the file is too short.
    """
    data = torch.empty(entry.size, dtype=torch.uint8)
    stream.seek(entry.start)
    if stream.readinto(data.numpy().data) != entry.size:
        raise OSError(f"{stream.name}: ends within {entry.name}")
    return data.view(DTYPES[entry.dtype]).view(entry.shape)


def _itemsize(entry: Spooled) -> int:
    return DTYPES[entry.dtype].itemsize


def _header(entries: list[Spooled], framework: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": framework}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    """Copy ``size`` bytes from ``start`` to the end of another file, inside the kernel."""
    while size:
        copied = os.sendfile(target.fileno(), source.fileno(), start, size)
        if copied == 0:
            raise OSError(f"{source.name}: ends {size} bytes early")
        start, size = start + copied, size - copied


class MlxShardWriter(ShardWriter):
    """Writes shards as mlx does."""

    framework = "mlx"
