"""A warm parent: a process that has imported what stages need, and forks one child for each request.

``python -m workers.machine.forkserver FOLDER OWNER FD MODULE...`` listens on the socket FD, which lies in FOLDER.
The process has one thread, no CUDA context and no model, so that a fork is in the state of a new process that has
imported the same modules. It checks this after its imports, and exits with a message otherwise. It ends with its owner,
and all children with it; a child also ends when the connection that requested it closes.

Messages are JSON, one a line: ``{entry, folder, environment, cwd, nice}`` comes in, ``{"pid"}`` and ``{"status"}`` go
out, or ``{"refused"}``.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from workers.machine import child

# Files in FOLDER: the socket, and the one written after the imports, which holds the process's size in bytes.
SOCKET, READY = "socket", "ready.json"
STATUS, MAPS, TASKS = Path("/proc/self/status"), Path("/proc/self/maps"), Path("/proc/self/task")
# Library that the first CUDA call loads; a process that has called CUDA can't fork children that use the GPU.
CUDA = "libcuda.so"
# Variables that libraries read at import: a request with other values is refused, and starts without a parent.
READ_AT_IMPORT = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS|TORCH|PYTORCH|PYTHON|BNB|LD|XDG_CACHE)_|HOME$|PYTHONPATH$")
# Exceptions: variables that are read at each call, or that the child passes on to the modules.
READ_LATER = re.compile(
    r"(\w*_)?TOKEN$|HF_HUB_OFFLINE$|TORCHDYNAMO_DISABLE$|PYTORCH_NVML_BASED_CUDA_CHECK$|PYTHONPATH$|PYTHONUNBUFFERED$"
)


@dataclass(eq=False)
class ForkRequest:
    """A request: its connection (None: closed), the bytes read so far, its child's process ID and pidfd."""

    line: socket.socket | None
    said: bytearray = field(default_factory=bytearray)
    pid: int = 0
    end: int = -1


class Server:
    """Forks a child for each request on the socket, until it is retired and the last child has ended."""

    def __init__(self, listener: socket.socket, address: str, environment: Mapping[str, str]) -> None:
        self._listener: socket.socket | None = listener
        self._address = address
        self._environment = dict(environment)
        self._open: set[ForkRequest] = set()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (listener, self._woken):
            self._selector.register(each, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Serve requests; returns in the parent alone, once retired."""
        while self._listener is not None or self._open:
            for key, _ in self._selector.select():
                asked: ForkRequest | None = key.data
                if asked is None:
                    self._accept() if key.fileobj is self._listener else self._close_listener()
                elif key.fd == asked.end:
                    self._reap(asked)
                elif asked.line is not None:
                    self._hear(asked, asked.line)

    def retire(self) -> None:
        """Accept no more requests; may be called in a signal handler."""
        self._wake.send(b"\0")

    def end(self) -> None:
        """Kill all children."""
        for asked in self._open:
            if asked.pid:
                _kill(asked.pid)

    def _close_listener(self) -> None:
        self._woken.recv(64)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        line, _ = self._listener.accept()
        asked = ForkRequest(line)
        self._open.add(asked)
        self._selector.register(line, selectors.EVENT_READ, asked)

    def _hear(self, asked: ForkRequest, line: socket.socket) -> None:
        """Read more of a request; if the client has closed the connection, kill its child."""
        try:
            more = line.recv(1 << 16)
        except ConnectionError:
            more = b""
        if not more:
            self._hang_up(asked, line)
            if asked.pid:
                _kill(asked.pid)
            return
        asked.said += more
        if asked.said.endswith(b"\n") and not asked.pid:
            self._begin(asked, line, json.loads(asked.said))

    def _hang_up(self, asked: ForkRequest, line: socket.socket) -> None:
        self._selector.unregister(line)
        line.close()
        asked.line = None
        if not asked.pid:
            self._open.discard(asked)

    def _begin(self, asked: ForkRequest, line: socket.socket, told: dict[str, Any]) -> None:
        if differing := _differing(self._environment, told["environment"]):
            _send(line, {"refused": f"it was started with another environment ({', '.join(differing)})"})
            self._hang_up(asked, line)
            return
        parent = os.getpid()
        asked.pid = os.fork()
        if asked.pid == 0:
            self._let_go()
            _become(told, parent, self._address)
        asked.end = os.pidfd_open(asked.pid)
        self._selector.register(asked.end, selectors.EVENT_READ, asked)
        _send(line, {"pid": asked.pid})

    def _let_go(self) -> None:
        """In a child: close what is the parent's, so that connections close when their other end does."""
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        self._wake.close()

    def _reap(self, asked: ForkRequest) -> None:
        # While it isn't reaped nobody else has its number: what it left running goes with it.
        _kill(asked.pid)
        _, status = os.waitpid(asked.pid, 0)
        self._selector.unregister(asked.end)
        os.close(asked.end)
        asked.pid, asked.end = 0, -1
        self._open.discard(asked)
        if asked.line is not None:
            _send(asked.line, {"status": status})
            self._hang_up(asked, asked.line)


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    with suppress(ConnectionError):  # gone: the selector tells so next
        line.sendall(json.dumps(message).encode() + b"\n")


def _differing(mine: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The variables that were read by what is imported, and are wanted otherwise."""
    names = {name for name in (*mine, *wanted) if READ_AT_IMPORT.match(name) and not READ_LATER.match(name)}
    return sorted(name for name in names if mine.get(name) != wanted.get(name))


def _kill(pid: int) -> None:
    """A child with all that it started; one that has no session yet has started nothing."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------ in a child


def _become(told: dict[str, Any], parent: int, address: str) -> None:
    """From a fork to a process of its own; never returns."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child.die_with(parent)
        folder = Path(told["folder"])
        _redirect(folder)
        os.chdir(told["cwd"])
        os.nice(max(0, told["nice"] - os.nice(0)))
        os.environ.clear()
        os.environ.update(told["environment"])
        os.environ[child.WARM] = address
        sys.argv = [told["entry"], told["folder"]]
        _refresh()
        child.perform(told["entry"], folder)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _finish(code)


def _redirect(folder: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for name, number in ((child.STDOUT, 1), (child.STDERR, 2)):
        file = os.open(folder / name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)


def _refresh() -> None:
    """What a new process draws or reads when it imports: random state, and how many threads it may use."""
    gc.enable()
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) and (threads := os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(int(threads))


def _finish(code: int) -> None:
    """End as a program does, without taking apart thousands of modules."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ------------------------------------------------------------------------------------------ the parent's start


def preload(modules: Sequence[str]) -> None:
    """Import modules; what isn't installed, or doesn't load, is left to the children, and said."""
    gc.disable()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name}: not preloaded ({error})", file=sys.stderr, flush=True)
    gc.collect()
    # The garbage collector writes into what it looks at, and so would copy the parent's memory into every child.
    gc.freeze()


def unfit() -> str | None:
    """Why this process mustn't be forked, if so."""
    threads = len(list(TASKS.iterdir()))
    if threads > 1:
        return f"what was imported started {threads - 1} thread(s)"
    if CUDA in MAPS.read_text():
        return "what was imported called CUDA"
    return None


def resident_bytes(status: Path = STATUS) -> int:
    """What a process has resident now; 0 for one that is gone."""
    try:
        found = re.search(r"VmRSS:\s*(\d+) kB", status.read_text())
    except OSError:
        return 0
    return 1024 * int(found.group(1)) if found else 0


def _main(folder: Path, owner: int, listener: socket.socket, modules: Sequence[str]) -> None:
    child.die_with(owner, signal.SIGTERM)
    environment = dict(os.environ)
    preload(modules)
    if reason := unfit():
        sys.exit(f"not fit to be forked: {reason}")
    server = Server(listener, str(folder / SOCKET), environment)

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    def retire(number: int, frame: FrameType | None) -> None:
        server.retire()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, retire)
    (folder / READY).write_text(json.dumps({"bytes": resident_bytes()}))
    try:
        server.serve()
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])), sys.argv[4:])
