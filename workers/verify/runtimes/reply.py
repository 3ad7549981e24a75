"""Builds the reply of a runtime's process: its result, or its library's exception. Standard library only."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.machine.card_errors import card_error

# Messages of libraries that need hardware which this machine lacks.
NOT_HERE = re.compile(r"(?i)no gpu|(requires?|needs?) (a |an )?(\w+ )?(gpu|cuda|accelerator|xpu)|cuda is not available")

# Flags of x86-64 in Linux's cpuinfo, the most capable first.
INSTRUCTIONS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


class NotHere(NotImplementedError):
    """What can't be computed on this machine, which is no fault of a checkpoint."""


def reply(request: str, look: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The JSON answer to a ``RuntimeRequest``.

    ``look`` loads the artifact, writes the logits, and returns ``version``, ``problems`` (sentences), ``generated``
    (token ids after each prompt) and ``host_bytes`` (peak of this process); if it likes, ``processor``, left out: this
    machine's, and ``kernels``, why the library's own weren't run. Its exception becomes ``error``, with ``not_here``
    set if this machine lacks hardware or a package; out of memory, not the artifact's fault, is re-raised.
    """
    try:
        return json.dumps({"processor": processor(), **look(json.loads(request))})
    except Exception as error:
        if out_of_memory(error):
            raise
        missing = isinstance(error, ImportError | NotHere) or bool(NOT_HERE.search(str(error)))
        return json.dumps({"error": in_a_line(error), "not_here": missing})


def processor() -> str:
    """This machine's processor, with the vector instructions that libraries choose kernels by."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().partition("flags")[2].partition("\n")[0].split()) if info.is_file() else set()
    known = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    return " with ".join([platform.machine(), *known[:1]])


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out or a card failed, which isn't the checkpoint's fault; the process ends by it."""
    ran_out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return ran_out or "out of memory" in str(error) or card_error(error) is not None


def in_a_line(error: Exception) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
