"""The warm parents of this machine: one process per interpreter that has imported what stages need.

Parents end with the process that owns them. Linux only; on other systems every process starts without one.
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
from workers.machine.secrets import without_secrets

# A parent is replaced once its memory exceeds GROWTH times its size after the imports by GROWTH_BYTES: a library leaks.
GROWTH, GROWTH_BYTES = 1.25, 64 * 1024**2
# Attempts to start a parent that never becomes ready; seconds that it may take to end.
TRIES, END_SECONDS = 2, 10.0
# Unix socket paths are limited to 107 bytes, so the folder is directly under /tmp.
FOLDER, PREFIX = Path("/tmp"), "quantmill-parent-"
# Variables that keep the imports from starting threads (numpy's BLAS, pyarrow's allocator) and from calling CUDA.
PARENTS_OWN = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# Device files of the NVIDIA and AMD drivers: a GPU is present if one exists.
CARDS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))

# Modules that stages, runtime checks and `quantmill verify` import, lazily imported ones included (found by comparing
# sys.modules before and after each of them).
VERIFY_MODULES = (
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.processing_utils",
    "datasets",
    "workers.verify.foreign",
    "workers.verify.stage",
)
MODULES = (*VERIFY_MODULES, "workers.engines.linear", "workers.quantize.one_pass")
# Not preloaded where a GPU is present: importing it queries the GPU's capability, which initializes CUDA.
MODULES_WITHOUT_CARD = ("workers.engines.bitsandbytes",)


class Parent:
    """One warm parent process. It listens at ``address`` from the start, and answers once its imports are done.

    Raises:
        OSError: ``python`` doesn't start, or its socket can't be created.
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
            # Renamed once it listens: a client that sees the path gets an answer.
            Path(f"{self.address}.new").rename(self.address)
            return self._start(listener.fileno(), own)

    def _start(self, listener: int, own: bool) -> subprocess.Popen[bytes]:
        given = {**without_secrets(os.environ), **PARENTS_OWN}
        # OpenMP threads that spin while they wait are three times as slow on cores that other processes use, too.
        given.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # The parent sees all GPUs; each child gets the CUDA_VISIBLE_DEVICES of its request.
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
        """The process ID."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether its imports were completed, also if it has ended since."""
        return self._bytes is not None

    @property
    def _bytes(self) -> int | None:
        with suppress(OSError, ValueError, LookupError, TypeError):
            return int(json.loads((self._folder / READY).read_text())["bytes"])
        return None

    @property
    def stale(self) -> str | None:
        """Why it should be replaced; None if it needn't be."""
        if identity(self._python) != self._identity:
            return "its environment changed"
        first, now = self._bytes, resident_bytes(Path(f"/proc/{self.pid}/status"))
        if first is not None and now > GROWTH * first + GROWTH_BYTES:
            return f"it grew from {first / 1e6:.0f} to {now / 1e6:.0f} MB"
        return None

    @property
    def said(self) -> str:
        """The last line of its stderr."""
        return (child.tail(self._folder / child.STDERR).strip().splitlines() or ["it said nothing"])[-1]

    def retire(self) -> None:
        """Accept no more requests; the process ends after its last child."""
        Path(self.address).unlink(missing_ok=True)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGHUP if self.ready else signal.SIGTERM)

    def close(self) -> None:
        """End the process and its children."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            # A child is in an uninterruptible call.
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Parents:
    """The warm parents of a run on one machine, each started at its first use."""

    def __init__(self, modules: Sequence[str] | None = None) -> None:
        self._modules = modules
        self._parents: dict[str | None, Parent] = {}
        self._retired: list[Parent] = []
        self._tries: dict[str | None, int] = {}

    def address(self, python: str | None = None) -> tuple[str | None, str | None]:
        """The socket of an interpreter's parent (None: of this process's interpreter), or the reason for having none.

        A parent that died, grew, or whose environment changed is replaced; one that dies before it's ready, only once.
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
        """Remove a parent that is to be replaced; returns the reason if no other is to be started."""
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
        """Whether any parent in use is running."""
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
