"""Implement ``quantmill chat``: talk with a checkpoint in the library that its users load it with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.checking import checkpoint_folder, quantization_of
from workers.errors import UnsupportedRecipe
from workers.machine import child
from workers.machine.environments import interpreter
from workers.spec.formats import recognised
from workers.spec.runtimes import Runtime, checking

TALK = "workers.verify.runtimes.talk"


def talk(checkpoint: str, prompts: Sequence[str], tokens: int) -> int:
    """Answer prompts, or the lines of standard input where none are given; returns the exit code of the library.

    ``checkpoint``: a folder, or a Hub repository.

    Raises:
        ModelNotFound, CheckpointError, HubUnavailable: there is no such checkpoint, or it can't be read.
        UnsupportedRecipe: its runtime has a command of its own for that.
        PreflightError: its runtime's environment isn't built here.
    """
    path = Path(checkpoint)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files:
        raise UnsupportedRecipe(f"chat: got a GGUF file; talk to it in llama.cpp: llama-cli -m {files[0]}")
    folder = checkpoint_folder(checkpoint)
    runtime = _runtime(folder)
    python = interpreter(runtime.environment) if runtime.environment else Path(sys.executable)
    environment = {**os.environ, "PYTHONPATH": child.import_path()}
    command = [str(python), "-m", TALK, str(folder), runtime.name, str(tokens)]
    lines = "".join(f"{' '.join(prompt.splitlines())}\n" for prompt in prompts)
    done = subprocess.run(command, env=environment, input=lines or None, text=True, check=False)
    return done.returncode


def _runtime(folder: Path) -> Runtime:
    """The runtime that talks for a checkpoint.

    Raises:
        UnsupportedRecipe: its runtime has a command of its own for that.
    """
    row = recognised(quantization_of(folder))
    runtime = checking(row.name if row else None)
    if runtime.name == "vLLM":
        raise UnsupportedRecipe(f"chat: {str(folder)!r} is read by vLLM alone; serve it: vllm serve {folder}")
    return runtime
