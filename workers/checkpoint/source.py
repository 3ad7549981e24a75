"""Reads checkpoints on disk tensor by tensor (safetensors, or pickles if allowed), and copies the files beside them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import CheckpointError, UnsupportedModel

INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".index.json")
# Files at the top of a checkpoint that are rewritten for the artifact.
REPLACED = frozenset({"config.json", "README.md", "quantmill.json", ".gitattributes"})
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Tensors by their names in a checkpoint, stored as floats or decoded from codes."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor, in the checkpoint's order."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous."""


class Source:
    """An opened checkpoint folder: headers are read immediately, tensors on demand.

    Raises:
        CheckpointError: there are no weights, a shard is truncated, or the index doesn't match the shards.
        UnsupportedModel: the weights are pickles, which aren't allowed.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._places: dict[str, tuple[int, int, int]] = {}
        self._pickled: dict[str, Tensor] = {}
        self.headers: dict[str, Header] = {}
        shards = _shards(folder)
        if shards:
            with self._stack:
                for shard in shards:
                    self._open(shard)
                _check_index(folder, self.headers)
                self._stack = self._stack.pop_all()
        else:
            self._pickled = _load_pickles(folder, allow_pickle)
            self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._pickled.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        if name not in self.headers:
            raise CheckpointError(f"checkpoint {self.folder}: no tensor {name!r}; it has {len(self.headers)} others")
        if self._pickled:
            return self._pickled[name].contiguous()
        # Read, not mapped: mapped pages of all layers would count toward this process's memory.
        file, start, size = self._places[name]
        data = torch.empty(size, dtype=torch.uint8)
        _read_into(data.numpy().data, file, start)
        header = self.headers[name]
        return data.view(header.dtype).view(header.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        files = _shards(self.folder) or _pickles(self.folder)
        return sum(path.stat().st_size for path in files)

    def _open(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as reader:  # the library's own checks of the file
                names = list(reader.keys())
            file = os.open(shard, os.O_RDONLY)
            self._stack.callback(os.close, file)
            length = int.from_bytes(os.pread(file, 8, 0), "little")
            described = json.loads(os.pread(file, length, 8))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {shard}: truncated or no safetensors ({error}); fetch it again"
            ) from error
        for name in names:
            if name in self.headers:
                raise CheckpointError(f"checkpoint {self.folder}: {name!r} stands in two shards; fetch it again")
            entry = described[name]
            start, end = entry["data_offsets"]
            self.headers[name] = Header(tuple(entry["shape"]), _dtype(shard, name, entry["dtype"]))
            self._places[name] = (file, 8 + length + start, end - start)


def _read_into(target: memoryview, file: int, start: int) -> None:
    """Fill ``target`` from byte ``start`` of a file; positional reads, so that threads can read concurrently."""
    while target:
        count = os.preadv(file, [target], start)
        if count == 0:
            raise CheckpointError("checkpoint: a file became shorter while it was read; fetch it again")
        target, start = target[count:], start + count


def _dtype(shard: Path, name: str, name_of_dtype: str) -> torch.dtype:
    if name_of_dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"checkpoint {shard}: dtype of {name!r}: got {name_of_dtype!r}, expected one of {known}")
    return DTYPES[name_of_dtype]


def _shards(folder: Path) -> list[Path]:
    """The index's shards in its order; otherwise model.safetensors; otherwise all safetensors files."""
    index = folder / INDEX
    if index.is_file():
        names = dict.fromkeys(_weight_map(index).values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise CheckpointError(f"checkpoint {folder}: the index names {missing}, which isn't there; fetch it again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {index}: no readable index ({error}); fetch it again") from error
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"checkpoint {index}: weight_map must map keys to files; fetch it again")
    return placed


def _check_index(folder: Path, headers: Mapping[str, Header]) -> None:
    index = folder / INDEX
    if index.is_file():
        named = set(_weight_map(index))
        if named != set(headers):
            odd = sorted(named ^ set(headers))[:5]
            raise CheckpointError(f"checkpoint {folder}: index and shards disagree about {odd}; fetch it again")


def _pickles(folder: Path) -> list[Path]:
    usual = sorted(folder.glob("pytorch_model*.bin"))
    return usual or sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)


def _load_pickles(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    files = _pickles(folder)
    if not files:
        raise CheckpointError(f"checkpoint {folder}: no weights; expected model.safetensors or shards with an index")
    if not allow_pickle:
        raise UnsupportedModel(
            f"checkpoint {folder}: pickle weights only, got {[path.name for path in files[:3]]}; convert them to "
            "safetensors, or set allow_pickle: true for this model"
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _load_pickle(path)
    return tensors


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"checkpoint {path}: broken, not only weights, or of torch before 1.6 ({reason}); convert it to safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"checkpoint {path}: expected tensors by name; save the model's state_dict alone")
    return loaded


def companion_files(source: Path) -> list[Path]:
    """Files of a checkpoint that are copied unchanged into its artifact: tokenizer, templates, licence, ..."""
    files = (path for path in sorted(source.rglob("*")) if path.is_file())
    relative = (path.relative_to(source) for path in files)
    return [
        path
        for path in relative
        if str(path) not in REPLACED
        and not path.name.endswith(WEIGHT_SUFFIXES)
        and not any(part.startswith((".", "__")) for part in path.parts)
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companion files byte by byte."""
    for path in companion_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
