"""Converts errors for the driver, and measures this process's peak memory."""

from __future__ import annotations

import errno
import shutil
import sys
import traceback
from pathlib import Path

from workers.errors import DeviceLost, DeviceUnusable, DiskFull, HubUnavailable, OutOfMemory, QuantmillError, WorkerDied
from workers.machine.card_errors import card_error, card_error_at_end
from workers.machine.child import Ended
from workers.machine.memory import peak_host_bytes, ran_out
from workers.machine.remedies import with_remedy
from workers.spec.bounds import printable_lines
from workers.spec.job import Failure, PeakMemory


def describe(error: BaseException) -> Failure:
    """Describe an error for the driver: its class in ``workers.errors``, or its own class if it isn't ours."""
    known = classify(error)
    message = printable_lines(str(known)) or type(known).__name__
    return Failure(
        kind=type(known).__name__,
        # Ours name their remedy themselves.
        message=message if isinstance(known, QuantmillError) else with_remedy(message),
        retry_after=known.retry_after if isinstance(known, HubUnavailable) else None,
        traceback=printable_lines("".join(traceback.format_exception(error))[-8000:]),
    )


def classify(error: BaseException) -> BaseException:
    """The same error, or our equivalent: out of memory, disk full, or what a card is at fault for."""
    if isinstance(error, QuantmillError):
        return error
    if (of_a_card := card_error(error)) is not None:
        return of_a_card
    if ran_out(error) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory(f"out of memory ({error}); use a larger machine, or lower calibration.samples")
    # safetensors reports a full disk as its own error, with the system's text in it.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        return DiskFull(f"{no_space(error)}; free some, or choose another --out")
    return error


def no_space(error: BaseException) -> str:
    """What a full disk has: the file that didn't fit, and the free bytes of its file system, where they are known."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str):
        return f"no space left on the device ({error})"
    folder = next((path for path in Path(named).absolute().parents if path.is_dir()), Path("/"))
    disk = shutil.disk_usage(folder)
    free = f"{disk.free / 1e9:.3g} GB of {disk.total / 1e9:.3g} GB are free"
    return f"no space left for {named!r}: {free} in {str(folder)!r}"


def of_a_process(what: str, ended: Ended) -> OutOfMemory | WorkerDied | DeviceLost | DeviceUnusable:
    """The error for a process that ended without an answer; ``what`` begins the message."""
    if (of_a_card := card_error_at_end(ended.stderr)) is not None:
        return type(of_a_card)(f"{what}: {of_a_card}")
    if ended.memory:
        return OutOfMemory(
            f"{what}: out of memory ({ended.memory}); use a larger machine, or lower calibration.samples"
        )
    return WorkerDied(f"{what}: the process ended without an answer (exit code {ended.code}: {ended.said})")


def peak_memory() -> PeakMemory:
    """Peak memory of this process in bytes, on the host and on that of its CUDA devices whose allocator held most."""
    torch = sys.modules.get("torch")
    device = 0
    if torch is not None and torch.cuda.is_initialized():
        device = max(torch.cuda.max_memory_reserved(card) for card in range(torch.cuda.device_count()))
    return PeakMemory(host=peak_host_bytes(), device=device)
