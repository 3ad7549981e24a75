"""Ends a hanging stage: by an exception if Python still runs, otherwise by ending its process."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from workers.errors import StageHung

# Seconds between the exception and the end of the process: a library that holds the interpreter blocks signals.
GRACE_SECONDS = 60.0
EXIT_CODE = 75


@contextmanager
def ends_within(seconds: float, what: str, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise ``StageHung`` after ``seconds`` in the context (infinite: never), or end its process ``grace`` s later.

    In a thread other than the main one, which signals don't reach, only the process's end is possible.
    """

    def hung(number: int, frame: FrameType | None) -> None:
        raise StageHung(f"{what}: no end within {seconds:.0f} s, which is many times its estimate; it was ended")

    def give_up() -> None:
        print(f"{what}: no end within {seconds + grace:.0f} s, nor an answer to a signal", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    if math.isinf(seconds):
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    last = threading.Timer(seconds + grace, give_up)
    last.daemon = True
    last.start()
    before = signal.signal(signal.SIGALRM, hung) if in_main else None
    try:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        last.cancel()
