"""The importance matrix as llama.cpp's tools write and read it (tools/imatrix, common/imatrix-loader): a GGUF file with
the sums of squares of each matrix's inputs, and the tokens that they are of.

Tensors ``NAME.in_sum2`` float32 (M, I) and ``NAME.counts`` float32 (M, 1): M is 1, or the number of experts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.gguf_file import ALIGNMENT, ARRAY, MAGIC, STRING, UINT32, VERSION, Place, entry, string, strings
from workers.spec.base import Frozen

# How a tensor's squares are named in a writer's spool, before the tensor's key: (I + 1,), its count last.
SPOOLED = "imatrix|"


class Described(Frozen):
    """Where an importance matrix comes from: names of the texts, sequences, and tokens of each."""

    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def squares(gram_II: Tensor, count: int) -> Tensor:
    """The sums of squares of the inputs, and their count: float32 (I + 1,)."""
    return torch.cat([gram_II.diagonal().float().cpu(), torch.tensor([float(count)])])


@dataclass(frozen=True)
class Matrix:
    """The inputs of one tensor of a file: the keys of its M parts, and the width I."""

    name: str
    keys: tuple[str, ...]
    width: int


def matrices(places: Iterable[Place], known: Collection[str]) -> Iterator[Matrix]:
    """The tensors of a file of which the squares of all pieces' inputs are ``known`` by key.

    Of several pieces that aren't experts the first's count: they have one input.
    """
    for place in places:
        keys = tuple(piece.key for piece in place.pieces)
        experts = place.shape[0] if len(place.shape) == 3 else 1
        if keys and all(key in known for key in keys) and (experts == 1 or len(keys) == experts):
            yield Matrix(place.name, keys[:experts], place.shape[-1])


def write(path: Path, described: Described, tensors: Iterable[Matrix], read: Callable[[str], Tensor]) -> None:
    """Write the file, by name as llama.cpp does; ``read`` returns the ``squares`` of a key."""
    ordered = sorted(tensors, key=lambda matrix: matrix.name)
    keys = [
        entry("general.type", STRING, string("imatrix")),
        entry("imatrix.datasets", ARRAY, strings(list(described.datasets))),
        entry("imatrix.chunk_count", UINT32, struct.pack("<I", described.chunks)),
        entry("imatrix.chunk_size", UINT32, struct.pack("<I", described.chunk_size)),
    ]
    header = MAGIC + struct.pack("<IQQ", VERSION, 2 * len(ordered), len(keys)) + b"".join(keys)
    start = 0
    for matrix in ordered:
        for suffix, columns in (("in_sum2", matrix.width), ("counts", 1)):
            rows = len(matrix.keys)
            header += string(f"{matrix.name}.{suffix}") + struct.pack("<IQQIQ", 2, columns, rows, 0, start)
            start += 4 * rows * columns + -4 * rows * columns % ALIGNMENT
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as target:
        target.write(_padded(header))
        for matrix in ordered:
            rows_MI = torch.stack([read(key) for key in matrix.keys])
            for part in (rows_MI[:, :-1], rows_MI[:, -1:]):
                target.write(_padded(part.contiguous().numpy().tobytes()))
        target.flush()
        os.fsync(target.fileno())
    partial.rename(path)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)
