"""The warm parents of this machine, one for each interpreter; they end with the process that owns them.

Linux only: elsewhere there are none, and every process starts from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.machine import child
from workers.machine.forkserver import READY, SOCKET, resident_bytes

# A parent has grown that has so many times, and so many bytes more, than after its imports: libraries that leak.
GROWTH, GROWTH_BYTES = 1.25, 64 * 1024**2
# How often a parent that never got ready is tried; how long it may take to end.
TRIES, END_SECONDS = 2, 10.0
# A path of a socket holds no more than 107 bytes.
FOLDER, PREFIX = Path("/tmp"), "quantmill-parent-"
# While it imports, neither a thread (of numpy's BLAS, of pyarrow's allocator) nor a call into CUDA.
PARENTS_OWN = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# Cards, by the files that their drivers make.
CARDS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))

# What stages, the check of a runtime and `quantmill verify` import, also late: what sys.modules had more after each.
MODULES = (
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.processing_utils",
    "datasets",
    "workers.engines.linear",
    "workers.engines.bitsandbytes",
    "workers.quantize.one_pass",
    "workers.verify.foreign",
    "workers.verify.stage",
)
# It asks a card for its capability as soon as it's imported, which starts CUDA.
MODULES_WITHOUT_CARD = ("bitsandbytes",)


class Parent:
    """One warm parent: a process that listens at ``address`` from the start, and answers once it has imported.

    Raises:
        OSError: ``python`` doesn't start, or there's no room for its socket.
    """

    def __init__(self, python: str | None = None, modules: Sequence[str] | None = None) -> None:
        self._python = python or sys.executable
        self._modules = tuple(modules) if modules is not None else _modules()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDER))
        self._identity = identity(self._python)
        self.address = str(self._folder / SOCKET)
        try:
            self._process = self._listen(own=python is None)
        except OSError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self, own: bool) -> subprocess.Popen[bytes]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.address}.new")
            listener.listen(128)
            # Whoever sees it under its name is answered.
            Path(f"{self.address}.new").rename(self.address)
            return self._start(listener.fileno(), own)

    def _start(self, listener: int, own: bool) -> subprocess.Popen[bytes]:
        given = {**os.environ, **PARENTS_OWN}
        # Threads that wait for one another in a loop take three times as long where others want the cores, too.
        given.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # It sees all cards, each of its children those that are its own.
        given.pop("CUDA_VISIBLE_DEVICES", None)
        given.pop(child.WARM, None)
        if own:
            given["PYTHONPATH"] = child.import_path()
        command = [self._python, "-P", "-m", "workers.machine.forkserver", str(self._folder), str(os.getpid())]
        with (self._folder / child.STDERR).open("wb") as said:
            return subprocess.Popen(
                [*command, str(listener), *self._modules],
                cwd=self._folder,
                env=given,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[listener],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The parent's process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it has imported, be it alive or not."""
        return self._bytes is not None

    @property
    def _bytes(self) -> int | None:
        with suppress(OSError, ValueError):
            return int(json.loads((self._folder / READY).read_text())["bytes"])
        return None

    @property
    def stale(self) -> str | None:
        """Why another one should take its place, if so."""
        if identity(self._python) != self._identity:
            return "its environment changed"
        first, now = self._bytes, resident_bytes(Path(f"/proc/{self.pid}/status"))
        if first is not None and now > GROWTH * first + GROWTH_BYTES:
            return f"it grew from {first / 1e6:.0f} to {now / 1e6:.0f} MB"
        return None

    @property
    def said(self) -> str:
        """The last line that it printed."""
        return (child.tail(self._folder / child.STDERR).strip().splitlines() or ["it said nothing"])[-1]

    def retire(self) -> None:
        """Let it end once its children have."""
        Path(self.address).unlink(missing_ok=True)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGHUP if self.ready else signal.SIGTERM)

    def close(self) -> None:
        """End it, and its children."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            # It waits for a child that can't end yet.
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Parents:
    """The parents that a run has on one machine, started when they're first asked for."""

    def __init__(self, modules: Sequence[str] | None = None) -> None:
        self._modules = modules
        self._parents: dict[str | None, Parent] = {}
        self._retired: list[Parent] = []
        self._tries: dict[str | None, int] = {}

    def address(self, python: str | None = None) -> tuple[str | None, str | None]:
        """The socket of the parent of an interpreter (None: this one's own), or why there's none.

        One that died, grew, or whose environment changed is replaced; one that dies before it's ready, once.
        """
        if sys.platform != "linux":
            return None, None
        parent = self._parents.get(python)
        if parent is not None and parent.alive and parent.stale is None:
            return parent.address, None
        if parent is not None and (note := self._let_go(python, parent)):
            return None, note
        _sweep()
        try:
            self._parents[python] = started = Parent(python, self._modules)
        except OSError as error:
            return None, f"not started warm: no parent starts ({error})"
        self._tries[python] = self._tries.get(python, 0) + 1
        return started.address, None

    def _let_go(self, python: str | None, parent: Parent) -> str | None:
        """Make room for another in its place; or why there should be none."""
        if not parent.alive and not parent.ready and self._tries[python] >= TRIES:
            return f"not started warm: the parent doesn't start ({parent.said})"
        if parent.ready:
            self._tries[python] = 0
        del self._parents[python]
        if parent.alive:
            parent.retire()
            self._retired.append(parent)
        else:
            parent.close()
        return None

    def alive(self) -> bool:
        """Whether any of those in use can be asked."""
        return any(parent.alive for parent in self._parents.values())

    def close(self) -> None:
        """End all of them."""
        for parent in (*self._parents.values(), *self._retired):
            parent.close()


def identity(python: str) -> tuple[object, ...]:
    """What changes when the environment of an interpreter is built anew, or packages are installed there."""
    prefix = Path(python).parent.parent
    places = [prefix / "pyvenv.cfg", *sorted(prefix.glob("lib/python3*/site-packages"))]
    return os.path.realpath(prefix), *(place.stat().st_mtime_ns for place in places if place.exists())


def _sweep() -> None:
    """Clear away what killed parents of this user left."""
    for place in FOLDER.glob(f"{PREFIX}*/{SOCKET}"):
        with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
            if place.stat().st_uid != os.getuid():
                continue
            try:
                line.connect(str(place))
            except ConnectionRefusedError:
                shutil.rmtree(place.parent, ignore_errors=True)


def _modules() -> tuple[str, ...]:
    return MODULES if any(card.exists() for card in CARDS) else (*MODULES, *MODULES_WITHOUT_CARD)
