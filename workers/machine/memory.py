"""Measures this process's peak memory. No torch."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int:
    """Peak resident memory of this program in bytes; elsewhere than on Linux getrusage's, which includes the program
    that started it."""
    match = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return 1024 * (int(match.group(1)) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
