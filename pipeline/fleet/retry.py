"""What is done about a failed stage: a pure function of the error's class and of what was tried before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from workers.errors import DiskFull, HubUnavailable, OutOfMemory, StageHung, WorkerDied
from workers.spec.job import Failure

# Attempts in all, by error class. Whatever isn't named here, or below, would fail the same way again.
ATTEMPTS = {HubUnavailable.__name__: 6, WorkerDied.__name__: 3, StageHung.__name__: 2}
LONGEST_WAIT_SECONDS = 300.0


class RetryMode(Enum):
    """In what way a stage is tried again."""

    SAME = "as it was"
    ALONE = "alone on its node, and in the smallest micro-batches"
    LARGER = "on a node with more memory"
    ROOMIER = "on a node with more disk"


@dataclass(frozen=True)
class Retry:
    """Try again, after so many seconds."""

    seconds: float
    how: RetryMode = RetryMode.SAME


@dataclass(frozen=True)
class Choices:
    """What else the cluster has to offer to a stage that failed."""

    larger: bool = False
    roomier: bool = False


NO_CHOICE = Choices()


def decide(failure: Failure, before: Sequence[tuple[str, RetryMode]], choices: Choices = NO_CHOICE) -> Retry | None:
    """What to do; None: give up.

    ``before`` has every attempt that failed so far, this one last, as its error's class and how it was made. Transient
    errors wait, twice as long each time; a Hub's ``Retry-After`` is kept to, up to ``LONGEST_WAIT_SECONDS``. What ran
    out of memory or disk is never tried again in the same way at the same place.
    """
    kind = failure.kind
    tried = [how for name, how in before if name == kind]
    if kind == OutOfMemory.__name__:
        # Alone costs its neighbours their place, but no download; a larger node is the last thing to try.
        if RetryMode.ALONE not in tried:
            return Retry(0.0, RetryMode.ALONE)
        return Retry(0.0, RetryMode.LARGER) if choices.larger else None
    if kind == DiskFull.__name__:
        return Retry(0.0, RetryMode.ROOMIER) if choices.roomier and RetryMode.ROOMIER not in tried else None
    if len(tried) >= ATTEMPTS.get(kind, 1):
        return None
    wait = min(max(2.0 ** (len(tried) - 1), failure.retry_after or 0.0), LONGEST_WAIT_SECONDS)
    return Retry(wait)
