"""The peak of this process's memory. No torch."""

from __future__ import annotations

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int:
    """The most that this program had resident so far; getrusage's, also of the program that started it, elsewhere
    than on Linux."""
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return 1024 * (int(found.group(1)) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
