"""A tensor's description, as in a safetensors header, and the header's checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from workers.errors import CheckpointError
from workers.spec.bounds import HEADER_BYTES, LARGEST_NUMBER, TENSORS, parse_json

# Bits of an element by the names of the safetensors format (0.7).
DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
DTYPE_BITS |= {"I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}
DTYPE_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class TensorHeader(NamedTuple):
    """A tensor's entry in a safetensors header; ``dtype`` is the header's name for it (BF16, F8_E4M3, ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return self.numel * DTYPE_BITS.get(self.dtype, 16) // 8

    @property
    def header_bytes(self) -> int:
        """Size of its entry in a safetensors header, in bytes, up to a few digits of the offsets."""
        return len(f'"{self.name}":{{"dtype":"{self.dtype}","shape":[{",".join(map(str, self.shape))}],') + 37


def parse_header(text: bytes, data_bytes: int, what: str) -> list[TensorHeader]:
    """The tensors of a safetensors file ``what``, from its header's JSON; ``data_bytes`` follow the header.

    Raises:
        CheckpointError: it isn't a safetensors header, or the file is shorter or longer than it says.
    """
    header = parse_json(text, f"{what}: safetensors header", HEADER_BYTES)
    if not isinstance(header, dict) or len(header) > TENSORS:
        raise CheckpointError(f"{what}: no safetensors header; replace it by the original file")
    header.pop("__metadata__", None)
    tensors, places = [], []
    for name, entry in header.items():
        tensors.append(_tensor(name, entry, what))
        places.append((*entry["data_offsets"], name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            raise CheckpointError(f"{what}: {name[:200]!r} begins at byte {start}, expected {end}; save the file anew")
        end = stop
    if end != data_bytes:
        kind = "truncated" if data_bytes < end else "longer than its header says"
        raise CheckpointError(
            f"{what}: {kind}, got {data_bytes} bytes of data, its header says {end}; complete the download, or save it "
            "anew"
        )
    return tensors


def _tensor(name: str, entry: Any, what: str) -> TensorHeader:
    """One entry of a header, with its types and size checked."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{what}: {name[:200]!r}: expected dtype, shape and data_offsets; save it anew")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    where = f"{what}: {name[:200]!r}"
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise CheckpointError(f"{where}: dtype: got {str(dtype)[:40]!r}, expected one of {known}; save the file anew")
    if not isinstance(shape, list) or not _whole(shape) or any(size > LARGEST_NUMBER for size in shape):
        raise CheckpointError(f"{where}: shape: got {str(shape)[:80]}, expected whole numbers; save the file anew")
    if not isinstance(offsets, list) or not _whole(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets: got {str(offsets)[:80]}, expected two; save the file anew")
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{where}: {offsets[1] - offsets[0]} bytes don't hold {dtype} of the shape {shape}; save the file anew"
        )
    return TensorHeader(name, tuple(shape), dtype)


def _whole(values: list[Any]) -> bool:
    """Whether the values are whole numbers from 0."""
    return all(type(number) is int and number >= 0 for number in values)
