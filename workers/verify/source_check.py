"""Compares the streamed source with the source as transformers loads it, once for each model.

Both are read from the same files by different code. A misread source would be compared with nothing but itself: its
artifacts would agree with their reference, and be of another model than the user's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.errors import CheckpointError, OutOfMemory, UnsupportedModel
from workers.machine.files import write_text
from workers.machine.preflight import available_host_bytes
from workers.methods.scaling import some
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.model.reference import ReferenceFile
from workers.spec.families import family_of
from workers.spec.job import ModelPin, SourceCheck
from workers.verify.runtimes.ask import in_a_process
from workers.verify.runtimes.source import SourceRequest

ENTRY = "workers.verify.runtimes.source:answer"
# Held-out sequences, and their last tokens, whose logits are compared: the reference has seen the same context.
SEQUENCES, POSITIONS = 2, 128
# Layers that a model is cut to if it doesn't fit in memory.
FIRST_LAYERS = 4
# Bytes of the process that loads it, without weights.
PROCESS_BYTES = 680_000_000
# Largest root mean square of the difference, in standard deviations of the logits. Measured on the smallest models of
# 171 families, and the trained ones of the tests: at most 6e-7 in float32, and 0.05 in bfloat16, where experts that are
# multiplied in another order send single tokens to other experts.
MOST_DIFFERENT = {torch.float32: 1e-3}
MOST_DIFFERENT_IN_HALF = 0.2


@dataclass(frozen=True)
class Checked:
    """What is compared: a model, streamed; ``cut`` streams its first layers. And where processes may write."""

    model: ModelPin
    folder: Path
    streamed: StreamedModel
    cut: Callable[[int], StreamedModel]
    file: ReferenceFile
    workspace: Path


def check(of: Checked, tokens_NT: Tensor, hidden: Callable[[], list[Tensor]]) -> SourceCheck:
    """The agreement of a model's reference with transformers; from the file beside the reference if it is there.

    ``hidden()`` is the whole reference: hidden states [B, T, hidden] of the held-out ``tokens_NT``.

    Raises:
        CheckpointError: transformers can't load the source, or initializes parameters that it lacks.
        UnsupportedModel: the logits differ.
        OutOfMemory, WorkerDied: its process ended before it answered, even for the first layers.
    """
    known = _kept(of.file)
    if known is not None:
        return known
    tokens = tokens_NT[:SEQUENCES]
    found = _whole(of, tokens, hidden) or _compared(of, tokens, None)
    write_text(of.file.source_check, found.model_dump_json() + "\n")
    return found


def _whole(of: Checked, tokens_NT: Tensor, hidden: Callable[[], list[Tensor]]) -> SourceCheck | None:
    """The check of all layers; None if they don't fit in memory."""
    outputs = torch.cat(hidden())[:SEQUENCES]
    if not _fits(of.streamed):
        return None
    with suppress(OutOfMemory):
        return _compared(of, tokens_NT, outputs)
    return None


def _compared(of: Checked, tokens_NT: Tensor, outputs_NTH: Tensor | None) -> SourceCheck:
    """Compare the reference's outputs with transformers, or, without them, both models cut to their first layers."""
    streamed, layers = of.streamed, None
    if outputs_NTH is None:
        layers = min(FIRST_LAYERS, len(streamed.layers))
        streamed = of.cut(layers)
        (outputs_NTH,) = stream(streamed, [tokens_NT])
    with tempfile.TemporaryDirectory(dir=_scratch(of.workspace)) as scratch:
        version, theirs = _by_transformers(of, tokens_NT, Path(scratch), layers)
    ours = LogitsHead(streamed).logits(outputs_NTH[:, -POSITIONS:]).float().cpu()
    difference = (theirs - ours).square().mean().sqrt().item() / max(ours.std().item(), 1e-9)
    limit = MOST_DIFFERENT.get(streamed.dtype, MOST_DIFFERENT_IN_HALF)
    if not difference <= limit:
        # A reference that was computed wrongly isn't taken again.
        of.file.path.unlink(missing_ok=True)
        raise UnsupportedModel(
            f"model {of.model.id!r}: quantmill reads the source otherwise than transformers {version}: their logits "
            f"differ by {difference:.3g} standard deviations (root mean square), expected at most {limit:g}; none of "
            "its artifacts is published. Leave it out of the zoo, and report it with its config.json"
        )
    return SourceCheck(
        version=version,
        relative_logit_difference=difference,
        tokens=theirs.shape[0] * theirs.shape[1],
        layers=len(streamed.layers),
        all_layers=len(of.streamed.layers),
    )


def _by_transformers(of: Checked, tokens_NT: Tensor, scratch: Path, layers: int | None) -> tuple[str, Tensor]:
    """Version and logits, float32 [N, POSITIONS, V], of transformers in a process of its own."""
    save_file({"tokens": tokens_NT.contiguous()}, scratch / "tokens.safetensors")
    request = SourceRequest(
        source=str(of.folder),
        scratch=str(scratch),
        dtype=str(of.streamed.dtype).removeprefix("torch."),
        positions=POSITIONS,
        layers=layers,
        loader=family_of(of.streamed.model.config.model_type).loader,
        trust_remote_code=of.model.trust_remote_code,
    )
    answer = in_a_process(ENTRY, request, scratch, f"source check of {of.model.id}")
    if "error" in answer:
        raise CheckpointError(
            f"model {of.model.id!r}: transformers itself can't run its source ({answer['error']}); no artifact of it "
            "can be right: mend the source, or leave it out of the zoo"
        )
    for kind, keys in (("lacks", answer["missing"]), ("has other shapes of", answer["mismatched"])):
        if keys:
            raise CheckpointError(
                f"model {of.model.id!r}: the source {kind} {some(keys)}, which transformers then draws at random; "
                "name a checkpoint that fits its config.json"
            )
    return answer["version"], load_file(scratch / "logits.safetensors")["logits"]


def _fits(streamed: StreamedModel) -> bool:
    """Whether a second process can hold the whole model, in the dtype that it's streamed in."""
    size: int = sum(parameter.numel() for parameter in streamed.model.parameters()) * streamed.dtype.itemsize
    if streamed.device != "cpu":
        free: int = torch.cuda.mem_get_info()[0]
        return size < free
    return size + PROCESS_BYTES < available_host_bytes()


def _kept(file: ReferenceFile) -> SourceCheck | None:
    try:
        return SourceCheck.model_validate_json(file.source_check.read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def _scratch(workspace: Path) -> Path:
    folder = workspace / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
