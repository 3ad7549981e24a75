"""Chooses the compute device and dtype, and opens a model for them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from workers.checkpoint.source import ModelSource
from workers.model.card_room import count_cards, has_card
from workers.model.loading import StreamedModel
from workers.spec.job import Job

# Where NVIDIA's kernel module says its version.
DRIVER = Path("/proc/driver/nvidia/version")


def compute_device() -> tuple[str, torch.dtype | None]:
    """Device and dtype of the computation: a GPU in the checkpoint's dtype (None), or the CPU in float32.

    This process is held to its share of the GPU from then on.
    """
    return ("cuda", None) if has_card() else ("cpu", torch.float32)


def card_of(device: str, count: int = 1) -> dict[str, str]:
    """Name, compute capability, driver and CUDA of a card, as manifests name it, and how many there were if several;
    empty for the CPU."""
    if torch.device(device).type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    told = {"card": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    if count > 1:
        told["cards"] = str(count)
    if DRIVER.is_file() and (found := re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())):
        told["driver"] = found[0]
    return {**told, "cuda": torch.version.cuda} if torch.version.cuda else told


def checkpoint_dtype(source: ModelSource) -> torch.dtype:
    """The floating dtype of most of a checkpoint's matrices."""
    counts: dict[torch.dtype, int] = {}
    for header in source.headers.values():
        if header.dtype.is_floating_point and len(header.shape) > 1:
            counts[header.dtype] = counts.get(header.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def open_models(job: Job, folder: Path, source: ModelSource) -> list[StreamedModel]:
    """Open the job's model once for each card of this process, the first to be streamed on ``compute_device``.

    That one's device, ``cuda``, is in each thread the card that the thread computes on (``cards.CardThread``).
    """
    return [open_model(job, folder, source), *(_on(f"cuda:{i}", job, folder, source) for i in range(1, count_cards()))]


def open_model(job: Job, folder: Path, source: ModelSource) -> StreamedModel:
    """Open the job's model on the meta device, to be streamed on ``compute_device``."""
    return _on(compute_device()[0], job, folder, source)


def _on(device: str, job: Job, folder: Path, source: ModelSource) -> StreamedModel:
    _, dtype = compute_device()
    return StreamedModel(
        folder,
        source,
        dtype=dtype or checkpoint_dtype(source),
        device=device,
        trust_remote_code=job.model.trust_remote_code,
    )
