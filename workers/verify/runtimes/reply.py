"""Builds the reply of a runtime's process: its result, or its library's exception. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# Messages of libraries that need hardware which this machine lacks.
NOT_HERE = re.compile(r"(?i)no gpu|(requires?|needs?) (a |an )?(\w+ )?(gpu|cuda|accelerator|xpu)|cuda is not available")


def reply(request: str, look: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The JSON answer to a ``RuntimeRequest``.

    ``look`` loads the artifact, writes the logits, and returns ``version``, ``problems`` (sentences), ``generated``
    (token ids after each prompt) and ``host_bytes`` (peak of this process). Its exception becomes ``error``, with
    ``not_here`` set if this machine lacks hardware or a package; out of memory, not the artifact's fault, is re-raised.
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
