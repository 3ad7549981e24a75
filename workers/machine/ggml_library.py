"""llama.cpp's shared library, from the environment ``llama-cpp``: its encoder of blocks is called in this process.

The file is loaded by its path, not imported: an extension module that needs nothing of Python is a plain library.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from workers.errors import PreflightError
from workers.machine.environments import interpreter
from workers.spec.ggml import TYPES

ENVIRONMENT = "llama-cpp"
PATTERN = "lib/python*/site-packages/xllamacpp/xllamacpp*.so"


def library_path() -> Path:
    """The library's file.

    Raises:
        PreflightError: the environment isn't built here, or lacks the library.
    """
    folder = interpreter(ENVIRONMENT).parent.parent
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise PreflightError(
            f"environment {ENVIRONMENT!r}: expected {folder / PATTERN}, which isn't there; run `quantmill env create "
            f"{ENVIRONMENT}`"
        )
    return found[0]


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    encode = library.ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def encode(kind: str, weights: int, out: int, rows: int, columns: int, importance: int | None) -> None:
    """Encode float32 rows at the address ``weights`` into blocks at ``out``; importances are float32 [columns].

    The library aborts the process on what it can't encode: all values must be finite, and the block must divide
    ``columns``.

    Raises:
        PreflightError: see ``library_path``.
    """
    row = TYPES[kind]
    assert columns % row.block == 0, f"{kind}: {row.block} doesn't divide {columns}"
    library = _library(library_path())
    library.ggml_quantize_init(row.number)
    written = library.ggml_quantize_chunk(row.number, weights, out, 0, rows, columns, importance)
    assert written == rows * row.row_bytes(columns), f"{kind}: {written} bytes written"
