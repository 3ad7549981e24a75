"""Measures memory, and decides what counts as out of memory. Standard library only: all that asks imports it."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from contextlib import suppress
from pathlib import Path

from workers.machine import cgroup

STATUS, SCORE = Path("/proc/self/status"), Path("/proc/self/oom_score_adj")
# What allocators say: torch's on the host, C++'s, the system's, and torch's on a GPU.
ALLOCATION = ("DefaultCPUAllocator", "can't allocate memory", "std::bad_alloc", "Cannot allocate memory")
SAID = (*ALLOCATION, "out of memory", "MemoryError", "OutOfMemory")
# Lines of stderr, from its end, in which a process says what ended it.
LAST_LINES = 5
# Share of its limit that a killed process's group must have come to meanwhile, to count as killed for want of memory.
NEAR = 0.95


def peak_host_bytes() -> int:
    """Peak resident memory of this program in bytes; elsewhere than on Linux getrusage's, which includes the program
    that started it."""
    match = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return 1024 * (int(match.group(1)) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def host_memory(root: Path = cgroup.ROOT) -> int:
    """Memory in bytes that this process may use at most: the machine's, or its control groups' smallest limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, cgroup.memory_limit(root) or total)


def ran_out(error: BaseException) -> bool:
    """Whether an error of the system or a library means that host memory couldn't be had."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(text in str(error) for text in ALLOCATION)


def expendable() -> None:
    """Make this process the first that the kernel kills for want of memory, before what started it."""
    with suppress(OSError):
        SCORE.write_text("1000")


class MemoryWatch:
    """Tells of a process that ends from now on whether memory was why."""

    def __init__(self, root: Path = cgroup.ROOT) -> None:
        self._root = root
        self._kills = cgroup.oom_kills(root)
        self._peak = cgroup.peak_bytes(root)

    @property
    def grew(self) -> bool:
        """Whether the kernel has killed a process for want of memory since."""
        return self._kills is not None and (cgroup.oom_kills(self._root) or 0) > self._kills

    def why(self, code: int, stderr: str = "") -> str | None:
        """Why a process that ended with this exit code (negative: by that signal) was out of memory; None if not so."""
        if code == -signal.SIGKILL:
            kills = cgroup.oom_kills(self._root)
            limit = cgroup.memory_limit(self._root)
            peaks = self._peak, cgroup.peak_bytes(self._root)
            return killed(self._kills, kills, limit, peaks, host_memory(self._root))
        said = stderr.strip().splitlines()[-LAST_LINES:]
        if code:
            return next((" ".join(line.split()) for line in reversed(said) if any(text in line for text in SAID)), None)
        return None


def killed(before: int | None, after: int | None, limit: int | None, peaks: tuple[int, int], total: int) -> str | None:
    """Why a process that SIGKILL ended was out of memory, by the kernel's count of such kills; None if it was not.

    ``limit`` in bytes is that of the control groups, ``peaks`` the most that they had used before and after, ``total``
    what there is at all. Other programs that guard memory aren't counted: they are known by a use that came near the
    limit meanwhile. Where nobody counts, SIGKILL is taken for the kernel's.
    """
    if after is None or before is None:
        return "it was killed (SIGKILL), as the kernel does without memory"
    if after > before:
        return f"the kernel killed it for want of memory, at a limit of {limit_text(total)}"
    if limit is not None and limit <= total and peaks[0] < NEAR * limit <= peaks[1]:
        return f"it was killed (SIGKILL) with {limit_text(peaks[1])} of {limit_text(limit)} in use"
    return None


def limit_text(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.1f} GiB"
