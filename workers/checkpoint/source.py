"""Reads checkpoints on disk tensor by tensor (safetensors, or pickles if allowed), and copies the files beside them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import CheckpointError
from workers.machine.files import open_checkpoint
from workers.spec.checkpoint_files import INDEX as INDEX
from workers.spec.checkpoint_files import CheckpointFiles
from workers.spec.expert_stacks import ExpertPart, split_names

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


class ModelSource(TensorSource, Protocol):
    """A model that artifacts are made of: its tensors, and the folder that they come from.

    ``Source``, or ``formats.kept.KeptSource`` for a model that is quantized already.
    """

    folder: Path
    variant: str | None

    @property
    def files(self) -> CheckpointFiles:
        """The files of the folder."""

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""


class Source:
    """An opened checkpoint folder: headers are read immediately, tensors on demand.

    Raises:
        CheckpointError: there are no weights, a shard is truncated, or the index names files that aren't there.
        UnsupportedModel: the weights are pickles, which aren't allowed.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False, variant: str | None = None) -> None:
        self.folder = folder
        self.variant = variant
        self._stack = ExitStack()
        self._places: dict[str, tuple[int, int, int]] = {}
        self._pickled: dict[str, Tensor] = {}
        self.headers: dict[str, Header] = {}
        self.files = open_checkpoint(folder, f"checkpoint {folder}", variant=variant, allow_pickle=allow_pickle)
        if self.files.pickled:
            self._pickled = _load_pickles(folder, self.files.weights)
            self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._pickled.items()}
        else:
            with self._stack:
                for name in self.files.weights:
                    self._open(folder / name)
                self._stack = self._stack.pop_all()

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
        read_into(data.numpy().data, file, start)
        header = self.headers[name]
        return data.view(header.dtype).view(header.shape)

    def read_part(self, name: str, index: int) -> Tensor:
        """One slice of a tensor's first dimension, on the CPU, contiguous: as ``read(name)[index]``."""
        return self._slice(name, self.headers[name], index)

    def _slice(self, name: str, header: Header, index: int) -> Tensor:
        if self._pickled:
            return self._pickled[name][index].contiguous()
        file, start, size = self._places[name]
        part = size // header.shape[0]
        data = torch.empty(part, dtype=torch.uint8)
        read_into(data.numpy().data, file, start + index * part)
        return data.view(header.dtype).view(header.shape[1:])

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self.files.weights)

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
                f"checkpoint {shard}: truncated or no safetensors ({error}); complete its download, or save it anew"
            ) from error
        for name in names:
            if name in self.headers:
                raise CheckpointError(
                    f"checkpoint {self.folder}: {name!r} stands in two shards; remove it from one of them"
                )
            entry = described[name]
            start, end = entry["data_offsets"]
            self.headers[name] = Header(tuple(entry["shape"]), _dtype(shard, name, entry["dtype"]))
            self._places[name] = (file, 8 + length + start, end - start)


class SplitSource(Source):
    """A checkpoint whose stacks of experts are presented as linear layers, one for each expert and projection.

    Raises:
        CheckpointError, UnsupportedModel: as ``Source``.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False, variant: str | None = None) -> None:
        super().__init__(folder, allow_pickle=allow_pickle, variant=variant)
        self._stacks, self.headers = self.headers, {}
        self._parts: dict[str, ExpertPart] = {}
        for key, header in self._stacks.items():
            parts = list(split_names(key, header.shape))
            if not parts:
                self.headers[key] = header
            for name, place, shape_OI in parts:
                self._parts[name] = place
                self.headers[name] = Header(shape_OI, header.dtype)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous; an expert's as a linear layer stores it, (O, I).

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        place = self._parts.get(name)
        if place is None:
            return super().read(name)
        stack_IO = self._slice(place.stack, self._stacks[place.stack], place.expert)
        return stack_IO.chunk(place.parts, dim=1)[place.part].T.contiguous()


def read_into(target: memoryview, file: int, start: int) -> None:
    """Fill ``target`` from byte ``start`` of a file; positional reads, so that threads can read concurrently."""
    while target:
        count = os.preadv(file, [target], start)
        if count == 0:
            raise CheckpointError(
                "checkpoint: a file became shorter while it was read; run again once nobody writes it"
            )
        target, start = target[count:], start + count


def _dtype(shard: Path, name: str, name_of_dtype: str) -> torch.dtype:
    if name_of_dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"checkpoint {shard}: dtype of {name!r}: got {name_of_dtype!r}, expected one of {known}")
    return DTYPES[name_of_dtype]


def _load_pickles(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= _load_pickle(folder / name)
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


def copy_companions(files: CheckpointFiles, source: Path, target: Path) -> None:
    """Copy the companion files of a checkpoint byte by byte: tokenizer, templates, licence, ..."""
    for name in files.companions:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
