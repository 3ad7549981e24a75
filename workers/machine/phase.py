"""What a process is at, in a few words, for whoever waits for it: the last line of a file. Standard library only.

The file is named by the environment variable ``QUANTMILL_PHASE``; without it nobody waits, and nothing is written.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "QUANTMILL_PHASE"
# Seconds within which a second word isn't written: layers of small models take milliseconds.
EVERY_SECONDS = 0.5


def tell(text: str) -> None:
    """Say what this process is at. Never fails: what it says helps, and is no result."""
    named = os.environ.get(VARIABLE)
    if not named:
        return
    path = Path(named)
    with suppress(OSError):
        if path.exists() and time.time() - path.stat().st_mtime < EVERY_SECONDS:
            return
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.replace(path)


def told(path: Path) -> str:
    """What was said last; empty: nothing yet."""
    try:
        return path.read_text()
    except OSError:
        return ""
