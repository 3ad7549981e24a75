"""Run an entry function of a module in a fresh process: a JSON text goes in, a JSON text comes back.

The process is a fork of a warm parent (``workers.machine.forkserver``) where there is one, else it starts from nothing,
from another interpreter if one is named: ``python -m workers.machine.child ENTRY FOLDER PARENT``. FOLDER holds what
passes between the two::

    request.json    written before it starts
    answer.json     written last, by rename
    stderr, stdout  what it and its libraries print

Standard library only: whatever asks or answers may import this.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workers.machine.memory import MemoryWatch, expendable
from workers.machine.secrets import without_secrets
from workers.spec.plugins import VARIABLE

REQUEST, ANSWER, STDOUT, STDERR = "request.json", "answer.json", "stdout", "stderr"
# Environment variable with the socket of the warm parent that a process may ask for children.
WARM = "QUANTMILL_WARM"
PR_SET_PDEATHSIG = 1
# Bytes that are read from the end of stderr.
TAIL_BYTES = 65536


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: by that signal), what it said last, and its answer.

    ``answer`` is None unless it ended with 0 and left one. ``note`` says why it didn't start warm though a parent was
    named; ``stderr`` has the last 64 KiB of what was printed there. ``memory`` says why, if memory ran out.
    """

    code: int
    stderr: str = ""
    answer: str | None = None
    note: str | None = None
    memory: str | None = None

    @property
    def said(self) -> str:
        """The last line of its stderr, or its exit code."""
        return (self.stderr.strip().splitlines() or [f"exit code {self.code}"])[-1]


class NoParent(Exception):
    """The warm parent can't start this child; a process without a parent can."""


def run(
    entry: str,
    request: str,
    *,
    python: str | Path | None = None,
    warm: str | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    seconds: float | None = None,
) -> Ended:
    """Call ``entry`` (``module:function``, JSON text to JSON text) in a fresh process that dies with this one.

    ``warm`` is the socket of a parent whose fork it becomes, left out: the one that this process came from; another
    ``python`` has none unless it's named. ``environment`` is the child's whole environment, left out: this process's;
    the secrets in it are left out.

    Raises:
        TimeoutError: no end within ``seconds``; the process is killed.
        OSError: ``python`` doesn't start.
    """
    address, watch = warm or (os.environ.get(WARM) if python is None else None), MemoryWatch()
    with tempfile.TemporaryDirectory(prefix="quantmill-") as scratch:
        folder = Path(scratch)
        (folder / REQUEST).write_text(request)
        given = without_secrets(os.environ if environment is None else environment)
        told = {
            "entry": entry,
            "folder": scratch,
            "environment": given,
            "cwd": str(cwd or Path.cwd()),
            "nice": os.nice(0),
        }
        note = None
        if address:
            try:
                return _ended(folder, _fork(address, told, seconds), watch)
            except NoParent as reason:
                note = f"not started warm: {reason}"
                (folder / ANSWER).unlink(missing_ok=True)
        return replace(_ended(folder, _start(entry, folder, python, given, cwd, seconds), watch), note=note)


def _ended(folder: Path, code: int, watch: MemoryWatch) -> Ended:
    answer, stderr = folder / ANSWER, tail(folder / STDERR)
    said = answer.read_text() if code == 0 and answer.is_file() else None
    return Ended(code, stderr, said, memory=watch.why(code, stderr))


def tail(path: Path) -> str:
    """The end of a text file; empty if the file doesn't exist."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


# ------------------------------------------------------------------------------------------ from nothing


def import_path() -> str:
    """PYTHONPATH with this package's folder first, so that a checkout imports itself also from another folder."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))


def _start(
    entry: str, folder: Path, python: str | Path | None, given: dict[str, str], cwd: Path | None, seconds: float | None
) -> int:
    """Exit code of a process without a parent; another interpreter imports the quantmill installed in it."""
    # Another environment has no plugin of this one's, nor what it imports.
    given = {k: v for k, v in given.items() if k != VARIABLE} if python else {**given, "PYTHONPATH": import_path()}
    command = [str(python or sys.executable), "-P", "-m", __name__, entry, str(folder), str(os.getpid())]
    with (folder / STDOUT).open("wb") as out, (folder / STDERR).open("wb") as err:
        process = subprocess.Popen(command, cwd=cwd, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{entry}: no end within {seconds:.0f} s") from None
        finally:
            process.kill()
            process.wait()


def script(module: str, python: str | Path | None = None) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a module that is run as a script, by an interpreter that has quantmill.

    The environment is this process's without secrets. For what speaks for longer than one answer on standard input and
    output. The process dies with the thread that starts it; another ``python`` imports the quantmill that it has.
    """
    code = (
        "import runpy, sys; from workers.machine.child import die_with; die_with(int(sys.argv[1])); "
        "runpy.run_module(sys.argv[2], run_name='__main__')"
    )
    path = {} if python else {"PYTHONPATH": import_path()}
    environment = {**without_secrets(os.environ), **path}
    return [str(python or sys.executable), "-P", "-c", code, str(os.getpid()), module], environment


# ------------------------------------------------------------------------------------------ of a warm parent


def _fork(address: str, told: Mapping[str, object], seconds: float | None) -> int:
    """Exit code of a fork of the parent at ``address``, which kills it once this connection is closed.

    Raises:
        NoParent: it's gone, or refuses.
    """
    until = None if seconds is None else time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(address)
            line.sendall(json.dumps(told).encode() + b"\n")
            begun = _line(line, until)
        except FileNotFoundError as error:
            raise NoParent(f"no parent at {address}") from error
        except ConnectionError:
            begun = None
        if begun is None:
            raise NoParent(f"the parent is gone ({_last_words(address)})")
        if "refused" in begun:
            raise NoParent(str(begun["refused"]))
        try:
            ended = _line(line, until)
        except ConnectionError:
            ended = None
    # Children of a parent that died were killed with it.
    return -int(signal.SIGKILL) if ended is None else os.waitstatus_to_exitcode(int(ended["status"]))


def _line(line: socket.socket, until: float | None) -> dict[str, int | str] | None:
    """The next message; None if the other side closed the connection."""
    said = b""
    while not said.endswith(b"\n"):
        line.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
        more = line.recv(1)
        if not more:
            return None
        said += more
    message: dict[str, int | str] = json.loads(said)
    return message


def _last_words(address: str) -> str:
    return (tail(Path(address).with_name(STDERR)).strip().splitlines() or ["it said nothing"])[-1]


# ------------------------------------------------------------------------------------------ the fresh process


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when the thread that started it ends (Linux); exit if ``parent`` is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def perform(entry: str, folder: Path) -> None:
    """Answer the request in the folder."""
    expendable()
    module, _, name = entry.partition(":")
    answer = getattr(importlib.import_module(module), name)((folder / REQUEST).read_text())
    partial = folder / f"{ANSWER}.partial"
    partial.write_text(answer)
    partial.replace(folder / ANSWER)


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    perform(sys.argv[1], Path(sys.argv[2]))
