"""Checkpoints on disk: safetensors in, tensor by tensor; safetensors out, shard by shard, whole or not at all."""

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
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.content import write_text
from workers.errors import CheckpointError, UnsupportedModel

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2_000_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".index.json")
# Written anew for the artifact, at its top.
REPLACED = frozenset({"config.json", "README.md", "quantmill.json", ".gitattributes"})
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A stored tensor, before it's read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Tensors by their names in a checkpoint: stored as they are, or decoded from codes."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor, in the checkpoint's order."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous."""


class Source:
    """A checkpoint folder, opened: headers at once, tensors when they're asked for.

    Raises:
        CheckpointError: no weights, a truncated shard, an index that doesn't fit its shards.
        UnsupportedModel: pickle weights that weren't allowed.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._readers: dict[str, Any] = {}
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
            CheckpointError: there is none of that name.
        """
        if name not in self.headers:
            raise CheckpointError(f"checkpoint {self.folder}: no tensor {name!r}; it has {len(self.headers)} others")
        if self._pickled:
            return self._pickled[name].contiguous()
        tensor: Tensor = self._readers[name].get_tensor(name)
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        files = _shards(self.folder) or _pickles(self.folder)
        return sum(path.stat().st_size for path in files)

    def _open(self, shard: Path) -> None:
        try:
            reader = self._stack.enter_context(safe_open(shard, framework="pt"))
            for name in reader.keys():  # noqa: SIM118 - safe_open's own method, not a mapping's
                if name in self.headers:
                    raise CheckpointError(f"checkpoint {self.folder}: {name!r} stands in two shards; fetch it again")
                piece = reader.get_slice(name)
                self.headers[name] = Header(tuple(piece.get_shape()), _dtype(shard, name, piece.get_dtype()))
                self._readers[name] = reader
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {shard}: truncated or no safetensors ({error}); fetch it again"
            ) from error


def _dtype(shard: Path, name: str, found: str) -> torch.dtype:
    if found not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"checkpoint {shard}: dtype of {name!r}: got {found!r}, expected one of {known}")
    return DTYPES[found]


def _shards(folder: Path) -> list[Path]:
    """The shards that the index names, in its order; else the one file; else whatever safetensors there are."""
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
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"checkpoint {path}: broken, not only weights, or of torch before 1.6 ({said}); convert it to safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"checkpoint {path}: expected tensors by name; save the model's state_dict alone")
    return loaded


class ShardWriter:
    """Writes tensors into shards of bounded size, in the order of adding; names follow the Hub's conventions.

    Shards get their final names when ``close`` knows how many there are. Leaving the context without ``close``
    removes them.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []
        self._names: set[str] = set()
        self.total_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in range(len(self._written)):
            self._temporary(number).unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, of any device; it's copied to the host."""
        assert name not in self._names, f"{name} was written twice"
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._names.add(name)
        # A view would drag its whole storage along, and keep it alive.
        self._pending[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, and give the shards their names."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._temporary(0).rename(self._folder / "model.safetensors")
        else:
            files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
            for number, file in enumerate(files):
                self._temporary(number).rename(self._folder / file)
            placed = {name: file for names, file in zip(self._written, files, strict=True) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(placed.items()))}
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")
        self._written = []

    def _temporary(self, number: int) -> Path:
        return self._folder / f".shard-{number:05d}.partial"

    def _flush(self) -> None:
        path = self._temporary(len(self._written))
        self._written.append(list(self._pending))
        save_file(self._pending, path, metadata={"format": "pt"})
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.chmod(0o644)
        self._pending, self._pending_bytes = {}, 0


def companion_files(source: Path) -> list[Path]:
    """Every file of a checkpoint that goes into its artifact unchanged: tokenizer, templates, licence, ..."""
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
    """Copy the companion files by their bytes."""
    for path in companion_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
