"""Runs engines that make a whole artifact in their own process, with a library in its own environment.

The engine's script reads a ``WholeRequest`` as one line of JSON from standard input, writes a ``WholeAnswer`` as a
line of JSON to standard output, and leaves weights and config.json in the output folder, and the scales that it folded,
if any, in a folder of their own. This module adds what every artifact has (companion files, the record and the layout
beside it), and moves it to its final path by an atomic rename.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from workers.checkpoint.source import Source
from workers.engines.maker import copy_beside, put_in_place
from workers.errors import UnsupportedRecipe
from workers.machine import child
from workers.machine.card_errors import card_error
from workers.machine.environments import interpreter
from workers.machine.failures import of_a_process
from workers.machine.files import open_checkpoint
from workers.machine.memory import MemoryWatch
from workers.machine.phase import tell
from workers.spec.engines import Engine, WholeAnswer, WholeProgress, WholeRequest
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.layers import quantizable
from workers.spec.recipes import Recipe
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import artifact_folder, folds_folder

WEIGHTS = "*.safetensors"


def make(
    engine: Engine,
    job: Job,
    order: Order,
    source: Path,
    calibration_NT: Tensor | None,
) -> ArtifactMade:
    """Make the artifact of an order by an engine; ``source`` is the model's folder, tokens are int64 [N, T].

    Raises:
        UnsupportedRecipe: the engine reports an error, or leaves no weights or no config.json.
        WorkerDied: the engine's process ended without an answer.
        OutOfMemory: the kernel killed the engine's process for want of memory, or it says that memory ran out.
        PreflightError: the engine's environment isn't built here.
    """
    begun, target = time.monotonic(), artifact_folder(job.workspace, order)
    partial = target.with_name(f".{target.name}.partial")
    folds = partial.with_name(f"{partial.name}.folds")
    for folder in (partial, folds):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            request = WholeRequest(
                source=str(source),
                out=str(partial),
                folds=str(folds),
                recipe=order.recipe,
                calibration=_stored(calibration_NT, Path(scratch)),
                trust_remote_code=job.model.trust_remote_code,
                variant=job.model.variant,
                **_modules(order.recipe, source, job.model.variant),
            )
            answer = _ask(engine, request)
        pin = job.model
        files = open_checkpoint(source, f"checkpoint {source}", variant=pin.variant, allow_pickle=pin.allow_pickle)
        left_out = copy_beside(files, source, partial)
        shutil.rmtree(folds_folder(target), ignore_errors=True)
        if folds.is_dir():
            folds.rename(folds_folder(target))
        return _publish(engine, order, partial, target, answer, left_out, time.monotonic() - begun)
    finally:
        for folder in (partial, folds):
            shutil.rmtree(folder, ignore_errors=True)


def _modules(recipe: Recipe, source: Path, variant: str | None) -> dict[str, tuple[str, ...]]:
    """The modules to quantize, and the others with a matrix; by their names in the checkpoint."""
    with Source(source, variant=variant) as plain:
        tensors = [tensor for tensor in headers_of(plain) if tensor.name.endswith(".weight") and len(tensor.shape) == 2]
    wanted = {tensor.name.removesuffix(".weight"): quantizable(tensor, recipe) for tensor in tensors}
    return {
        "modules": tuple(name for name, chosen in wanted.items() if chosen),
        "left": tuple(name for name, chosen in wanted.items() if not chosen),
    }


def headers_of(source: Source) -> list[TensorHeader]:
    """The headers of a checkpoint, as the plan has them."""
    named = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return [
        TensorHeader(name, tuple(header.shape), named.get(str(header.dtype), str(header.dtype)))
        for name, header in source.headers.items()
    ]


def _stored(tokens_NT: Tensor | None, scratch: Path) -> str | None:
    if tokens_NT is None:
        return None
    path = scratch / "tokens.safetensors"
    save_file({"tokens": tokens_NT.contiguous()}, path)
    return str(path)


def _ask(engine: Engine, request: WholeRequest) -> WholeAnswer:
    """Run the engine's process; return its answer."""
    assert engine.script is not None, "engines without a script take part in the pass"
    command, environment = child.script(engine.script, interpreter(engine.environment) if engine.environment else None)
    watch = MemoryWatch()
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as process:
            try:
                answer = _answer(process, request)
            except BaseException:
                process.kill()  # otherwise leaving the context would wait for it
                raise
        complaints.seek(0)
        said = complaints.read()[-child.TAIL_BYTES :]
    ended = child.Ended(process.returncode, said, memory=watch.why(process.returncode, said))
    if ended.memory:
        raise of_a_process(f"engine {engine.name!r}", ended)
    if answer.error is not None:
        if (of_a_card := card_error(answer.error)) is not None:
            raise of_a_card
        raise UnsupportedRecipe(f"recipe {request.recipe.name!r}: engine {engine.name!r}: {answer.error}")
    if process.returncode or answer.layout is None:
        raise of_a_process(f"engine {engine.name!r}", ended)
    return answer


def _answer(process: subprocess.Popen[str], request: WholeRequest) -> WholeAnswer:
    """The engine's answer to a request; lines that its library prints in between are skipped."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # a process that ended early is reported by its exit code
        process.stdin.write(request.model_dump_json() + "\n")
        process.stdin.close()
    last = WholeAnswer()
    for line in process.stdout:
        with suppress(ValidationError):
            progress = WholeProgress.model_validate_json(line).progress
            print(f"{request.recipe.name}: {progress}", file=sys.stderr)
            tell(progress)
        with suppress(ValidationError):
            answer = WholeAnswer.model_validate_json(line)
            if answer.layout is not None or answer.error is not None:
                last = answer
    return last


def _publish(
    engine: Engine,
    order: Order,
    partial: Path,
    target: Path,
    answer: WholeAnswer,
    left_out: Sequence[str],
    seconds: float,
) -> ArtifactMade:
    size = sum(path.stat().st_size for path in partial.glob(WEIGHTS))
    if not size or not (partial / "config.json").is_file():
        raise UnsupportedRecipe(
            f"recipe {order.recipe.name!r}: engine {engine.name!r} left no {WEIGHTS} or no config.json in its folder"
        )
    fallbacks = (*answer.fallbacks, *left_out)
    artifact = ArtifactMade(
        recipe=order.recipe.name,
        path=str(target),
        bytes=size,
        seconds=seconds,
        fallbacks=fallbacks,
        made_with=answer.versions,
    )
    assert answer.layout is not None, "an answer without a layout was refused"
    put_in_place(partial, target, artifact, answer.layout)
    return artifact
