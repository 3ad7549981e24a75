"""How a runtime's process replies: what it found, or what its library raised. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# How a library says that it isn't the artifact's fault.
NOT_HERE = re.compile(r"(?i)no gpu|(requires?|needs?) (a |an )?(\w+ )?(gpu|cuda|accelerator|xpu)|cuda is not available")


def reply(request: str, look: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The JSON answer to a ``RuntimeRequest``.

    ``look`` loads the artifact, writes the logits, and returns ``version``, ``problems`` (sentences), ``generated``
    (token ids after each prompt) and ``host_bytes`` (peak of this process). What it raises becomes ``error``, with
    ``not_here`` for what this machine lacks; running out of memory is raised on, for it is no fault of the artifact.
    """
    try:
        return json.dumps(look(json.loads(request)))
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "out of memory" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        lines = str(error).strip().splitlines() or [""]
        missing = isinstance(error, ImportError) or bool(NOT_HERE.search(str(error)))
        return json.dumps({"error": f"{type(error).__name__}: {lines[0]}", "not_here": missing})
