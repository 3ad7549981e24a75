"""Loads an artifact in a runtime as its users will, in a fresh process, and reports the result."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.errors import WorkerDied
from workers.machine import child
from workers.machine.card_errors import card_error_at_end
from workers.machine.environments import interpreter
from workers.machine.failures import of_a_process
from workers.model.card_room import environment_of_child
from workers.spec.base import Frozen
from workers.spec.runtimes import Runtime, RuntimeRequest

DEADLINE_SECONDS = 1800.0


@dataclass(frozen=True)
class RuntimeAnswer:
    """A runtime's result; ``logits`` is None if it couldn't load the artifact.

    ``generated`` are the tokens after each prompt; ``infeasible`` are reasons why this machine can't run the check;
    ``kernels`` says why the library's own kernels weren't run here, empty if they were.
    """

    name: str
    version: str
    problems: tuple[str, ...] = ()
    infeasible: tuple[str, ...] = ()
    generated: tuple[tuple[int, ...], ...] = ()
    logits: Any = None
    host_bytes: int = 0
    processor: str = ""
    kernels: str = ""


def ask(
    row: Runtime,
    request: RuntimeRequest,
    tokens_NT: Tensor,
    prompts_PT: Tensor,
    held_out_NT: Tensor | None = None,
) -> RuntimeAnswer:
    """Load an artifact in a runtime's fresh process and run tokens (int64) through it; logits are float32 [N, T, V].

    Of ``held_out_NT``, transformers leaves each sequence's logits in ``scratch``. The runtime also generates greedily
    from each prompt. A crash of the library is a problem of the artifact, not an exception.

    Raises:
        OutOfMemory: the process ran out of memory: the machine's fault, not the artifact's.
        WorkerDied: it was killed by somebody else, or gave no answer within the deadline.
    """
    from safetensors.torch import load_file, save_file

    assert row.entry is not None, "only runtimes with an entry are asked"
    scratch = Path(request.scratch)
    held_out = {} if held_out_NT is None else {"held_out": held_out_NT.contiguous()}
    save_file({"tokens": tokens_NT, "prompts": prompts_PT, **held_out}, scratch / "tokens.safetensors")
    python = interpreter(row.environment) if row.environment else None
    answer = in_a_process(row.entry, request, scratch, f"runtime check of {request.artifact}", python)
    if "error" in answer:
        if answer["not_here"]:
            return RuntimeAnswer(
                row.name, "", infeasible=(f"runtime {row.name}: can't be tried here, {answer['error']}",)
            )
        return _failed(row, answer["error"])
    logits = load_file(scratch / "logits.safetensors")["logits"]
    generated = tuple(tuple(row) for row in answer["generated"])
    return RuntimeAnswer(
        name=row.name,
        version=answer["version"],
        problems=tuple(answer["problems"]),
        generated=generated,
        logits=logits,
        host_bytes=answer["host_bytes"],
        processor=answer["processor"],
        kernels=answer.get("kernels", ""),
    )


def in_a_process(entry: str, request: Frozen, scratch: Path, what: str, python: Path | None = None) -> dict[str, Any]:
    """The answer of an entry in a fresh process (``reply`` says its keys); a crash of the process is an ``error``.

    Raises:
        OutOfMemory: the process ran out of memory.
        DeviceLost, DeviceUnusable: its card failed.
        WorkerDied: it was killed by somebody else, or gave no answer within the deadline.
    """
    try:
        done = child.run(
            entry,
            request.model_dump_json(),
            python=python,
            environment=environment_of_child(),
            cwd=scratch,
            seconds=DEADLINE_SECONDS,
        )
    except TimeoutError:
        raise WorkerDied(f"{what}: no answer within {DEADLINE_SECONDS:.0f} s") from None
    if done.answer is None:
        # Nothing that a checkpoint could have done.
        if done.memory or done.code == -signal.SIGKILL or card_error_at_end(done.stderr) is not None:
            raise of_a_process(what, done)
        return {"error": f"the process ended with {done.code}: {done.said}", "not_here": False}
    answer: dict[str, Any] = json.loads(done.answer)
    return answer


def _failed(row: Runtime, what: str) -> RuntimeAnswer:
    return RuntimeAnswer(row.name, "", (f"runtime {row.name}: can't load the artifact, {what}",))
