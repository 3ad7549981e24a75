"""A tensor's description, as in a safetensors header."""

from __future__ import annotations

import math
from typing import NamedTuple

DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


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
        return self.numel * DTYPE_BYTES.get(self.dtype, 2)

    @property
    def header_bytes(self) -> int:
        """Size of its entry in a safetensors header, in bytes, up to a few digits of the offsets."""
        return len(f'"{self.name}":{{"dtype":"{self.dtype}","shape":[{",".join(map(str, self.shape))}],') + 37
