"""The reference: what the source model makes of the held-out text, kept as final hidden states.

Its logits are one head away, so the comparison is exact and the store small. It is made once for a model, its data and
a dtype: in the pass that calibrates, or on its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.spec.job import ModelPin
from workers.spec.workspace import MICRO_BATCH_TOKENS


@dataclass(frozen=True)
class ReferenceFile:
    """Where the reference of a model on some tokens lies; the name is its identity."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether it was made already."""
        return self.path.is_file()


def reference_file(model: ModelPin, workspace: Path, tokens_NT: Tensor, dtype: torch.dtype) -> ReferenceFile:
    """Identity: the model's commit, the tokens themselves, the dtype of the computation."""
    digest = hashlib.sha256(f"{model.id if model.endpoint else ''}@{model.revision} {dtype}".encode())
    digest.update(tokens_NT.numpy().tobytes())
    return ReferenceFile(workspace / "references" / f"{digest.hexdigest()[:32]}.safetensors")


def store(place: ReferenceFile, hidden: Sequence[Tensor]) -> None:
    """Keep the decoder's outputs, one tensor for each micro-batch; whole or not at all."""
    place.path.parent.mkdir(parents=True, exist_ok=True)
    partial = place.path.with_name(f".{place.path.name}.{os.getpid()}.partial")
    save_file({f"{index:06d}": batch.contiguous() for index, batch in enumerate(hidden)}, partial)
    partial.rename(place.path)


def load(place: ReferenceFile) -> list[Tensor]:
    """The decoder's outputs, [B, T, hidden] for each micro-batch."""
    with safe_open(place.path, framework="pt") as reader:
        return [reader.get_tensor(name) for name in sorted(reader.keys())]


def micro_batches(tokens_NT: Tensor, tokens: int = MICRO_BATCH_TOKENS) -> list[Tensor]:
    """Sequences in batches of at most ``tokens`` tokens, or of one sequence: int64 [B, T] each."""
    size = max(1, tokens // tokens_NT.shape[1])
    return list(torch.split(tokens_NT, size))
