"""Stores the reference: the source model's final hidden states on the held-out text.

The head turns them into logits, so the comparison is exact and the store small. It is computed once per model, data
set and dtype: in the calibration pass, or on its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.machine.files import set_aside
from workers.spec.job import ModelPin
from workers.spec.workspace import MICRO_BATCH_TOKENS

# Changes when sources are read otherwise: references of older versions aren't taken.
READING = 2


@dataclass(frozen=True)
class ReferenceFile:
    """File of a model's reference on some tokens; its name is its identity."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the reference is stored already; a damaged file is set aside."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, framework="pt"):
                return True
        except (OSError, SafetensorError) as error:
            set_aside(self.path, f"isn't readable ({error})")
            return False

    @property
    def source_check(self) -> Path:
        """File of the comparison of this reference with the source as transformers loads it."""
        return self.path.with_suffix(".source.json")


def reference_file(model: ModelPin, workspace: Path, held_out: Iterable[Tensor], dtype: torch.dtype) -> ReferenceFile:
    """Reference file identified by the model's commit, what it is given, and the dtype of the computation."""
    source = f"{model.id if model.endpoint else ''}@{model.revision} {model.variant}"
    digest = hashlib.sha256(f"{READING} {source} {dtype}".encode())
    for tensor in held_out:
        digest.update(tensor.numpy().tobytes())
    return ReferenceFile(workspace / "references" / f"{digest.hexdigest()[:32]}.safetensors")


def store(file: ReferenceFile, hidden: Sequence[Tensor]) -> None:
    """Write the decoder's outputs, one tensor per micro-batch, by atomic rename."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    partial = file.path.with_name(f".{file.path.name}.{os.getpid()}.partial")
    save_file({f"{index:06d}": batch.contiguous() for index, batch in enumerate(hidden)}, partial)
    partial.rename(file.path)


def load(file: ReferenceFile) -> list[Tensor]:
    """Read the decoder's outputs, [B, T, hidden] for each micro-batch."""
    with safe_open(file.path, framework="pt") as reader:
        return [reader.get_tensor(name) for name in sorted(reader.keys())]


def micro_batches(tokens_NT: Tensor, tokens: int = MICRO_BATCH_TOKENS) -> list[Tensor]:
    """Split sequences into batches of at most ``tokens`` tokens, or of one sequence: int64 [B, T] each."""
    size = max(1, tokens // tokens_NT.shape[1])
    return list(torch.split(tokens_NT, size))
