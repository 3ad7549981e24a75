"""Finds, in a checkpoint's headers alone, what vLLM can't fuse: parts of one layer that are stored in several ways."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path

from workers.spec.fusion import together

# Layouts with the outputs last; all others have them first.
OUTPUTS_LAST = frozenset({"qweight", "qzeros", "scales"})
Stored = frozenset[tuple[str, str, tuple[int, ...]]]


def stored_problems(checkpoint: Path) -> list[str]:
    """Messages about layers that vLLM fuses, and whose parts have several schemes."""
    found = _stored(checkpoint)
    problems = []
    for members in together(found):
        kinds = {module: found[module] for module in members}
        if len(set(kinds.values())) > 1:
            ways = "; ".join(f"{module}: {_words(kind)}" for module, kind in kinds.items())
            problems.append(
                f"vLLM fuses {', '.join(members)} into one layer, whose parts must be stored alike, got {ways}; "
                "quantize them under one scheme"
            )
    return problems


def _stored(checkpoint: Path) -> dict[str, Stored]:
    """How each module's tensors are stored: names, dtypes and all dimensions but that of the outputs."""
    parts: dict[str, set[tuple[str, str, tuple[int, ...]]]] = defaultdict(set)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        for name, tensor in header.items():
            module, _, leaf = name.rpartition(".")
            if name != "__metadata__" and leaf not in ("bias", "weight_shape", "g_idx"):
                shape = tuple(tensor["shape"])
                parts[module].add((leaf, tensor["dtype"], shape[:-1] if leaf in OUTPUTS_LAST else shape[1:]))
    return {module: frozenset(stored) for module, stored in parts.items()}


def _words(stored: Stored) -> str:
    return ", ".join(f"{leaf} {dtype}{list(shape)}" for leaf, dtype, shape in sorted(stored))
