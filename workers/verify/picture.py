"""Compares what a multimodal artifact and its source make of a picture, both loaded by transformers.

Towers and projectors stay as they are; whether they are where the class looks for them is seen by their effect alone.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.errors import CheckpointError
from workers.numerics.divergence import kl_divergence, top1_agreement
from workers.spec.auto_classes import PREPARED_BY, is_multimodal, loader_of
from workers.spec.job import ModelPin, PictureCheck
from workers.verify.runtimes.ask import in_a_process
from workers.verify.runtimes.picture import PROMPT, PictureRequest

ENTRY = "workers.verify.runtimes.picture:answer"
POSITIONS = 16  # the prompt's last tokens, which all come after the picture


@dataclass(frozen=True)
class Shown:
    """What the source makes of the picture: logits float32 [positions, V]; or why it was shown none."""

    version: str = ""
    logits_NV: Tensor | None = None
    unchecked: str = ""


def source_shown(model: ModelPin, folder: Path, config: Mapping[str, Any], workspace: Path) -> Shown | None:
    """Show the source the picture, unless that was done before; None if it isn't multimodal.

    Raises:
        CheckpointError: its processor or its class fails on it.
        OutOfMemory, WorkerDied: the process ended before it answered.
    """
    if not is_multimodal(config):
        return None
    if not any((folder / name).is_file() for name in PREPARED_BY):
        return Shown(unchecked=f"it comes without a processor ({' or '.join(PREPARED_BY)})")
    identity = f"{model.id if model.endpoint else ''}@{model.revision} {PROMPT}"
    kept = workspace / "references" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.picture.safetensors"
    if kept.is_file():
        return Shown("", load_file(kept)["logits"])
    answer, logits_NV = _show(model, folder, config, workspace)
    if "error" in answer:
        if answer["not_here"]:
            return Shown(unchecked=f"its processor can't be tried here, {answer['error']}")
        raise CheckpointError(
            f"model {model.id!r}: transformers can't show a picture to its source ({answer['error']}); mend its "
            "processor's files, or remove them if it's to be used for text alone"
        )
    if not answer["pixels"]:
        return Shown(unchecked="its processor prepares no pictures")
    assert logits_NV is not None
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits_NV}, kept)
    return Shown(answer["version"], logits_NV)


def check(
    shown: Shown, model: ModelPin, folder: Path, config: Mapping[str, Any], workspace: Path
) -> tuple[PictureCheck, tuple[str, ...]]:
    """Compare an artifact with what its source makes of the picture; and what else is wrong with it.

    Raises:
        OutOfMemory, WorkerDied: the process ended before it answered.
    """
    if shown.logits_NV is None:
        return PictureCheck(unchecked=shown.unchecked), ()
    answer, logits_NV = _show(model, folder, config, workspace)
    if "error" in answer:
        return PictureCheck(unchecked=answer["error"]), (f"picture: can't be shown to it, {answer['error']}",)
    assert logits_NV is not None
    if logits_NV.shape != shown.logits_NV.shape:
        said = f"picture: logits of {tuple(logits_NV.shape)}, the source's are {tuple(shown.logits_NV.shape)}"
        return PictureCheck(unchecked=said), (said,)
    kl_N = kl_divergence(shown.logits_NV, logits_NV)
    agreement = top1_agreement(shown.logits_NV, logits_NV).double().mean().item()
    return PictureCheck(
        version=answer["version"], kl_mean=kl_N.mean().item(), top1_agreement=agreement, tokens=len(kl_N)
    ), ()


def _show(
    model: ModelPin, folder: Path, config: Mapping[str, Any], workspace: Path
) -> tuple[dict[str, Any], Tensor | None]:
    parent = workspace / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        request = PictureRequest(
            folder=str(folder),
            scratch=scratch,
            loader=loader_of(config),
            dtype="auto",
            positions=POSITIONS,
            trust_remote_code=model.trust_remote_code,
        )
        answer = in_a_process(ENTRY, request, Path(scratch), f"picture shown to {folder.name}")
        logits = Path(scratch) / "logits.safetensors"
        return answer, load_file(logits)["logits"] if logits.is_file() and "error" not in answer else None
