"""Writes and reads a model as one GGUF file, tensor by tensor (specification: ggml's docs/gguf.md, version 3).

A file's tensors have llama.cpp's names and order of rows. Its own key ``quantmill.tensors`` says which tensors of the
checkpoint they were, so that a file is read under the checkpoint's names: a quantized matrix as its blocks, uint8
(O, bytes of a row), under its module's name and ``weight_KIND`` (``weight_KIND_t`` if the checkpoint stores (I, O)).
"""

from __future__ import annotations

import base64
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from workers.checkpoint.shards import Journal, ShardWriter, Spooled, read_back
from workers.checkpoint.source import DTYPES, Header, read_into
from workers.errors import CheckpointError
from workers.machine.files import open_checkpoint
from workers.spec.base import Frozen
from workers.spec.ggml import PLAIN, TYPES, GgmlType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
NAMES = "quantmill.tensors"
FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"
STORED = re.compile(r"\.weight_([a-z0-9_]+?)(_t)?$")
UINT32, STRING, ARRAY = 4, 8, 9
# Bytes of the values of a key by their type's number (specification, gguf_metadata_value_type).
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Larger headers belong to no file that a converter wrote.
MOST_ENTRIES = 1 << 24
# GGML_MAX_DIMS.
MOST_DIMENSIONS = 4


class Piece(Frozen):
    """A tensor of the checkpoint within one of the file: ``transposed`` matrices are stored (I, O) there.

    ``order`` (p, a, b, c) is how its p * a * b * c rows are rearranged: seen as (p, a, b, c), a and b are exchanged.
    ``shift`` is added to a vector: the norms of some families are stored as what they differ from one by.
    """

    key: str
    transposed: bool = False
    order: tuple[int, int, int, int] | None = None
    shift: float = 0.0


class Place(Frozen):
    """A tensor of the file: its shape (torch's order), its type where it isn't quantized, and its pieces, row by row.

    ``dtype`` is that of the pieces in the checkpoint; ``data`` is the content (base64) of one that no piece makes.
    """

    name: str
    shape: tuple[int, ...]
    kept: str
    dtype: str = "BF16"
    pieces: tuple[Piece, ...] = ()
    data: str | None = None


class Skeleton(Frozen):
    """What a file holds beside its weights: metadata as bytes (base64) of ``count`` keys, and its tensors' places."""

    count: int
    metadata: str
    places: tuple[Place, ...]


def reordered(rows: Tensor, order: tuple[int, int, int, int] | None) -> Tensor:
    """Rows in the file's order, from the checkpoint's."""
    if order is None:
        return rows
    p, a, b, c = order
    return rows.reshape(p, a, b, c, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def restored(rows: Tensor, order: tuple[int, int, int, int] | None) -> Tensor:
    """Rows in the checkpoint's order, from the file's."""
    return rows if order is None else reordered(rows, (order[0], order[2], order[1], order[3]))


# ------------------------------------------------------------------------------------------------ writing


Beside = Callable[[Path, list[str], Callable[[str], Tensor]], None]


class GgufWriter(ShardWriter):
    """Spools tensors as ``ShardWriter`` does; ``close`` writes them into one file, in the skeleton's order.

    ``describe`` first: without it there is nothing to write.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 1 << 62, journal: Journal | None = None) -> None:
        super().__init__(folder, 1 << 62, journal)
        self._skeleton: Skeleton | None = None
        self._file, self._file_type = "", 0
        self._beside: Beside | None = None

    def describe(self, skeleton: Skeleton, file: str, file_type: int, beside: Beside | None = None) -> None:
        """Say what the file is called and what it holds; ``file_type`` is llama.cpp's number of the mix.

        ``beside`` writes further files into a folder, from the names of all tensors that were added, which it can read.
        """
        self._skeleton, self._file, self._file_type, self._beside = skeleton, file, file_type, beside

    def close(self) -> None:
        """Write the file; every piece must have been added.

        Raises:
            CheckpointError: a tensor of the skeleton wasn't added.
        """
        assert self._skeleton is not None, "describe comes first"
        self.release()
        spool = self._folder / ".shard-00000.spool"
        spool.touch()
        entries = {_key(spooled.name): spooled for spooled in self._spooled}
        partial = self._folder / f".{self._file}.partial"
        with ExitStack() as stack:
            readers: dict[str, Any] = {}

            def read(spooled: Spooled) -> Tensor:
                path = spooled.file or str(spool)
                if path not in readers:
                    readers[path] = stack.enter_context(Path(path).open("rb"))
                return read_back(readers[path], spooled)

            target = stack.enter_context(partial.open("wb"))
            self._write(target, self._skeleton, entries, read)
            target.flush()
            os.fsync(target.fileno())
            if self._beside is not None:
                self._beside(self._folder, list(entries), lambda name: read(entries[name]))
        partial.rename(self._folder / self._file)
        for path in self._folder.glob(".shard-*.spool"):
            path.unlink()

    def _write(self, target: BinaryIO, skeleton: Skeleton, entries: Mapping[str, Spooled], read: Any) -> None:
        missing = [p.key for place in skeleton.places for p in place.pieces if p.key not in entries]
        if missing:
            raise CheckpointError(f"gguf: {len(missing)} tensors weren't written, as {missing[:3]}; report this fault")
        kinds = [_kind(place, entries) for place in skeleton.places]
        names = [place.model_dump_json(exclude={"data"}, exclude_defaults=True) for place in skeleton.places]
        own = [
            entry(FILE_TYPE, UINT32, struct.pack("<I", self._file_type)),
            entry(QUANTIZATION_VERSION, UINT32, struct.pack("<I", 2)),
            entry(
                NAMES,
                ARRAY,
                strings(names),
            ),
        ]
        target.write(MAGIC + struct.pack("<IQQ", VERSION, len(skeleton.places), skeleton.count + len(own)))
        target.write(base64.b64decode(skeleton.metadata) + b"".join(own))
        start = 0
        for place, kind in zip(skeleton.places, kinds, strict=True):
            shape = struct.pack(f"<{len(place.shape)}Q", *reversed(place.shape))
            target.write(string(place.name) + struct.pack("<I", len(place.shape)) + shape)
            target.write(struct.pack("<IQ", kind.number, start))
            start += -(-_size(place, kind) // ALIGNMENT) * ALIGNMENT
        for place, kind in zip(skeleton.places, kinds, strict=True):
            target.write(b"\0" * (-target.tell() % ALIGNMENT))
            before = target.tell()
            for data in _content(place, entries, read):
                target.write(data.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert target.tell() - before == _size(place, kind), f"{place.name}: not the size that was announced"
        target.write(b"\0" * (-target.tell() % ALIGNMENT))


def _key(stored: str) -> str:
    """The checkpoint's key of a stored tensor."""
    return STORED.sub(".weight", stored)


def _kind(place: Place, entries: Mapping[str, Spooled]) -> GgmlType:
    kinds = {match[1] if (match := STORED.search(entries[p.key].name)) else None for p in place.pieces}
    assert len(kinds) <= 1, f"{place.name}: made of tensors of several types, {kinds}"
    kind = next(iter(kinds), None)
    return PLAIN[place.kept] if kind is None else TYPES[kind]


def _size(place: Place, kind: GgmlType) -> int:
    return math.prod(place.shape[:-1]) * kind.row_bytes(place.shape[-1])


def _content(place: Place, entries: Mapping[str, Spooled], read: Any) -> Iterator[Tensor]:
    """The tensor's data, one piece at a time."""
    if place.data is not None:
        yield torch.frombuffer(bytearray(base64.b64decode(place.data)), dtype=torch.uint8)
    for piece in place.pieces:
        tensor = read(entries[piece.key])
        if STORED.search(entries[piece.key].name) is None:
            tensor = (tensor.T if piece.transposed else tensor).to(DTYPES[place.kept])
            tensor = tensor + piece.shift if piece.shift else tensor
        yield reordered(tensor, piece.order)


def string(text: str) -> bytes:
    """A text as a file has it: its length, then its bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def strings(texts: list[str]) -> bytes:
    """A list of texts, with their type and number."""
    return struct.pack("<IQ", STRING, len(texts)) + b"".join(map(string, texts))


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A key of the metadata, with the type of its value."""
    return string(key) + struct.pack("<I", kind) + value


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Part:
    """A tensor of the checkpoint within the file: where its rows start, and how they are stored."""

    start: int
    rows: int
    row_bytes: int
    dtype: torch.dtype
    kept: torch.dtype
    piece: Piece
    vector: bool


class GgufSource:
    """An opened folder whose weights are one GGUF file that quantmill wrote; tensors are read on demand.

    Raises:
        CheckpointError: the file is truncated, no GGUF, or lacks the names of the checkpoint's tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variant: str | None = None
        self.files = open_checkpoint(folder, f"checkpoint {folder}")
        self.headers: dict[str, Header] = {}
        self._parts: dict[str, _Part] = {}
        self._path = folder / self.files.weights[0]
        self._file = os.open(self._path, os.O_RDONLY)
        try:
            self._index()
        except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
            os.close(self._file)
            raise CheckpointError(
                f"checkpoint {self._path}: truncated or no GGUF file ({error}); complete its download, or make it anew"
            ) from error
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self._path.stat().st_size

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """What storing makes of a tensor that isn't quantized: it loses digits where a shift is added to it."""
        shift = self._parts[name].piece.shift
        return (tensor.float() + shift - shift).to(tensor.dtype) if shift else tensor

    def read(self, name: str) -> Tensor:
        """The tensor under its name in the checkpoint, on the CPU, contiguous.

        Raises:
            CheckpointError: there is no tensor of that name, or the file became shorter.
        """
        if name not in self._parts:
            raise CheckpointError(f"checkpoint {self._path}: no tensor {name!r}; it has {len(self._parts)} others")
        part = self._parts[name]
        size = part.rows * part.row_bytes
        if part.start + size > os.fstat(self._file).st_size:
            raise CheckpointError(f"checkpoint {self._path}: ends within {name!r}; complete its download")
        data = torch.empty(size, dtype=torch.uint8)
        read_into(data.numpy().data, self._file, part.start)
        tensor = data.view(part.kept)
        tensor = tensor if part.vector else tensor.view(part.rows, -1)
        tensor = restored(tensor, part.piece.order)
        tensor = tensor - part.piece.shift if part.piece.shift else tensor
        if STORED.search(name) is None and part.piece.transposed:
            tensor = tensor.T
        return tensor.to(part.dtype).contiguous()

    def _index(self) -> None:
        reader = _Reader(self._path)
        tensors, places = reader.header()
        if places is None:
            raise CheckpointError(
                f"checkpoint {self._path}: without the names of the original's tensors ({NAMES}), so it wasn't made by "
                "quantmill and can't be compared with it; load it in llama.cpp"
            )
        for place in places:
            shape, kind, start = tensors[place.name]
            position = start
            rows = math.prod(shape[:-1]) // max(len(place.pieces), 1) if len(shape) > 1 else 1
            for piece in place.pieces:
                position = self._take(place, piece, kind, position, shape, rows)

    def _take(self, place: Place, piece: Piece, kind: int, position: int, shape: tuple[int, ...], rows: int) -> int:
        """Note where a piece lies; the position behind it."""
        named = {row.number: name for name, row in (TYPES | PLAIN).items()}[kind]
        row_bytes = (TYPES | PLAIN)[named].row_bytes(shape[-1])
        vector = len(shape) == 1
        if named in TYPES:
            stored = piece.key.removesuffix(".weight") + f".weight_{named}" + "_t" * piece.transposed
            part = _Part(position, rows, row_bytes, torch.uint8, torch.uint8, piece, False)
            self.headers[stored] = Header((rows, row_bytes), torch.uint8)
        else:
            stored, kept = piece.key, DTYPES[named]
            count = shape[-1] if vector else rows
            part = _Part(
                position, count, kept.itemsize if vector else row_bytes, DTYPES[place.dtype], kept, piece, vector
            )
            plain = (count,) if vector else (shape[-1], rows) if piece.transposed else (rows, shape[-1])
            self.headers[stored] = Header(plain, DTYPES[place.dtype])
        self._parts[stored] = part
        return position + part.rows * part.row_bytes


class _Reader:
    """Reads a file's header; its data isn't touched."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size

    def header(self) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], tuple[Place, ...] | None]:
        """Shape, type and position of each tensor by name, and the places, if the file has them."""
        with self._path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError("its first bytes aren't GGUF")
            version, count, keys = struct.unpack("<IQQ", file.read(20))
            if version != VERSION or count > MOST_ENTRIES or keys > MOST_ENTRIES:
                raise ValueError(f"version {version} with {count} tensors and {keys} keys")
            places, alignment = None, ALIGNMENT
            for _ in range(keys):
                key, (kind,) = self._text(file), struct.unpack("<I", file.read(4))
                if key == NAMES:
                    places = tuple(map(Place.model_validate_json, self._texts(file)))
                elif key == "general.alignment":
                    (alignment,) = struct.unpack("<I", file.read(4))
                else:
                    self._skip(file, kind)
            entries = [self._tensor(file) for _ in range(count)]
            begin = -(-file.tell() // alignment) * alignment
        return {name: (shape, kind, begin + start) for name, shape, kind, start in entries}, places

    def _tensor(self, file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self._text(file), struct.unpack("<I", file.read(4))
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions))
        kind, start = struct.unpack("<IQ", file.read(12))
        return name, tuple(reversed(shape)), kind, start

    def _text(self, file: BinaryIO) -> str:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > self._size - file.tell():
            raise ValueError(f"a text of {length} bytes at byte {file.tell()}")
        return file.read(length).decode()

    def _texts(self, file: BinaryIO) -> list[str]:
        kind, count = struct.unpack("<IQ", file.read(12))
        if kind != STRING or count > MOST_ENTRIES:
            raise ValueError(f"{NAMES} of {count} values of the type {kind}")
        return [self._text(file) for _ in range(count)]

    def _skip(self, file: BinaryIO, kind: int) -> None:
        """Skip a value."""
        if kind == STRING:
            self._text(file)
        elif kind == ARRAY:
            inner, count = struct.unpack("<IQ", file.read(12))
            if inner == STRING:
                for _ in range(count):
                    self._text(file)
            else:
                file.seek(_SIZES[inner] * count, os.SEEK_CUR)
        else:
            file.seek(_SIZES[kind], os.SEEK_CUR)
