"""Run the command line in a process of its own, with or without a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

COMMAND = [sys.executable, "-m", "pipeline.cli"]


def quantmill(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output goes to pipes."""
    known = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_ENDPOINT")}
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd, env={**known, **environment}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def answered(
    arguments: Iterable[str], answers: Iterable[tuple[str, str]], cwd: Path, seconds: float = 60, columns: int = 120
) -> str:
    """Run a command in a terminal, give each answer once its question stands there; returns all that was printed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd, env={**os.environ, "COLUMNS": str(columns)}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    printed, until = "", time.monotonic() + seconds
    waiting = list(answers)
    seen = 0
    try:
        while time.monotonic() < until:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    printed += os.read(ours, 65536).decode()
                except OSError:  # the terminal of a process that has ended
                    break
            if waiting and waiting[0][0] in printed[seen:]:
                seen = len(printed)
                os.write(ours, f"{waiting.pop(0)[1]}\n".encode())
        process.wait(seconds)
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not waiting, printed
    return printed
