"""Compares the streamed source with the source as transformers loads it, once for each model.

Both are read from the same files by different code. A misread source would be compared with nothing but itself: its
artifacts would agree with their reference, and be of another model than the user's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.errors import CheckpointError, OutOfMemory, TransientError, UnsupportedModel
from workers.machine.files import write_text
from workers.machine.preflight import available_host_bytes
from workers.methods.scaling import some
from workers.model.card_room import room_on_card
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel, read_config
from workers.model.reference import ReferenceFile
from workers.spec.auto_classes import loader_of
from workers.spec.job import ModelPin, SourceCheck
from workers.verify.fidelity import rows
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


class _Theirs(NamedTuple):
    """Transformers' version, its logits (float32 [N, POSITIONS, V]), and the peak of its process."""

    version: str
    logits_NTV: Tensor
    host_bytes: int


def check(of: Checked, tokens_NT: Tensor, hidden: Callable[[], list[Tensor]]) -> SourceCheck:
    """The agreement of a model's reference with transformers; from the file beside the reference if it is there.

    ``hidden()`` is the whole reference: hidden states [B, T, hidden] of the held-out ``tokens_NT``.

    Raises:
        CheckpointError: transformers can't load the source, or initializes parameters that it lacks.
        UnsupportedModel: the logits differ.
        OutOfMemory, WorkerDied: its process ended before it answered, even for the first layers.
    """
    known = kept(of.file)
    if known is not None:
        return known
    tokens = tokens_NT[:SEQUENCES]
    # Every batch has a sequence at least.
    outputs = torch.stack(list(islice(rows(hidden()), SEQUENCES)))
    found = _whole(of, tokens, outputs) or _first_layers(of, tokens)
    if not found.unchecked:
        _keep(found, of.file)
    return found


def keep(found: SourceCheck, file: ReferenceFile, model: ModelPin, limit: float) -> None:
    """Keep an agreement beside the reference, if it is one.

    Raises:
        UnsupportedModel: the logits differ by more than ``limit``, and the reference is removed.
    """
    if not found.relative_logit_difference <= limit:
        raise _otherwise(model, file, found.version, found.relative_logit_difference, limit)
    _keep(found, file)


def _keep(found: SourceCheck, file: ReferenceFile) -> None:
    stored = found.model_copy(update={"host_bytes": 0})
    write_text(file.source_check, stored.model_dump_json() + "\n")


def _otherwise(model: ModelPin, file: ReferenceFile, version: str, difference: float, limit: float) -> UnsupportedModel:
    """The error of a source that is read differently; a reference that was computed wrongly isn't taken again."""
    file.path.unlink(missing_ok=True)
    return UnsupportedModel(
        f"model {model.id!r}: quantmill reads the source otherwise than transformers {version}: their "
        f"logits differ by {difference:.3g} standard deviations (root mean square), expected at most {limit:g}; "
        "none of its artifacts is published. Leave it out of the zoo, and report it with its config.json"
    )


def _whole(of: Checked, tokens_NT: Tensor, outputs_NTH: Tensor) -> SourceCheck | None:
    """The check of all layers; None if they don't fit in memory."""
    if _fits(of.streamed):
        with suppress(OutOfMemory):
            return _compared(of, of.streamed, outputs_NTH, _by_transformers(of, tokens_NT, None))
    return None


def _first_layers(of: Checked, tokens_NT: Tensor) -> SourceCheck:
    """The check of a model's first layers, which both sides cut by its config; or why that can't be done."""
    layers = min(FIRST_LAYERS, len(of.streamed.layers))
    try:
        cut = of.cut(layers)
        (outputs_NTH,) = stream(cut, [tokens_NT])
        theirs = _by_transformers(of, tokens_NT, layers)
    except (OutOfMemory, TransientError):
        raise
    except Exception as error:  # whatever a class does with a config that it was never given
        why = f"the whole model doesn't fit in memory, and its first {layers} layers are no model ({error})"
        return SourceCheck(all_layers=len(of.streamed.layers), unchecked=why)
    return _compared(of, cut, outputs_NTH, theirs)


def _compared(of: Checked, streamed: StreamedModel, outputs_NTH: Tensor, theirs: _Theirs) -> SourceCheck:
    """Compare a streamed model's outputs with transformers' logits."""
    ours = LogitsHead(streamed).logits(outputs_NTH[:, -POSITIONS:]).float().cpu()
    difference = (theirs.logits_NTV - ours).square().mean().sqrt().item() / max(ours.std().item(), 1e-9)
    limit = MOST_DIFFERENT.get(streamed.dtype, MOST_DIFFERENT_IN_HALF)
    if not difference <= limit:
        raise _otherwise(of.model, of.file, theirs.version, difference, limit)
    return SourceCheck(
        version=theirs.version,
        relative_logit_difference=difference,
        tokens=ours.shape[0] * ours.shape[1],
        layers=len(streamed.layers),
        all_layers=len(of.streamed.layers),
        host_bytes=theirs.host_bytes,
    )


def _by_transformers(of: Checked, tokens_NT: Tensor, layers: int | None) -> _Theirs:
    """What transformers makes of the source in a process of its own."""
    parent = of.workspace / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        save_file({"tokens": tokens_NT.contiguous()}, Path(scratch) / "tokens.safetensors")
        request = SourceRequest(
            source=str(of.folder),
            scratch=scratch,
            dtype=str(of.streamed.dtype).removeprefix("torch."),
            positions=POSITIONS,
            layers=layers,
            loader=loader_of(read_config(of.folder)),
            trust_remote_code=of.model.trust_remote_code,
            variant=of.model.variant,
        )
        answer = in_a_process(ENTRY, request, Path(scratch), f"source check of {of.model.id}")
        _require_whole(of.model, answer)
        logits = load_file(Path(scratch) / "logits.safetensors")["logits"]
        return _Theirs(answer["version"], logits, answer["host_bytes"])


def _require_whole(model: ModelPin, answer: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless transformers loaded every parameter from the source."""
    if "error" in answer:
        raise CheckpointError(
            f"model {model.id!r}: transformers itself can't run its source ({answer['error']}); no artifact of it can "
            "be right: mend the source, or leave it out of the zoo"
        )
    for kind, keys in (("lacks", answer["missing"]), ("has other shapes of", answer["mismatched"])):
        if keys:
            raise CheckpointError(
                f"model {model.id!r}: the source {kind} {some(keys)}, which transformers then draws at random; name a "
                "checkpoint that fits its config.json"
            )


def _fits(streamed: StreamedModel) -> bool:
    """Whether a second process can hold the whole model, in the dtype that it's streamed in."""
    size: int = sum(parameter.numel() for parameter in streamed.model.parameters()) * streamed.dtype.itemsize
    if streamed.device != "cpu":
        return size < room_on_card()
    return size + PROCESS_BYTES < available_host_bytes()


def kept(file: ReferenceFile) -> SourceCheck | None:
    """The agreement that is kept beside a reference; None if there is none."""
    try:
        return SourceCheck.model_validate_json(file.source_check.read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
