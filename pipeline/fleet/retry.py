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


class How(Enum):
    """In what way a stage is tried again."""

    SAME = "as it was"
    ALONE = "alone on its node, and in the smallest micro-batches"
    LARGER = "on a node with more memory"
    ROOMIER = "on a node with more disk"


@dataclass(frozen=True)
class Again:
    """Try again, after so many seconds."""

    seconds: float
    how: How = How.SAME


@dataclass(frozen=True)
class Choices:
    """What else the cluster has to offer to a stage that failed."""

    larger: bool = False
    roomier: bool = False


NO_CHOICE = Choices()


def decide(failure: Failure, before: Sequence[tuple[str, How]], choices: Choices = NO_CHOICE) -> Again | None:
    """What to do; None: give up.

    ``before`` has every attempt that failed so far, this one last, as its error's class and how it was made. Transient
    errors wait, twice as long each time; a Hub's ``Retry-After`` is kept to, up to ``LONGEST_WAIT_SECONDS``. What ran
    out of memory or disk is never tried again in the same way at the same place.
    """
    kind = failure.kind
    tried = [how for name, how in before if name == kind]
    if kind == OutOfMemory.__name__:
        # Alone costs its neighbours their place, but no download; a larger node is the last thing to try.
        if How.ALONE not in tried:
            return Again(0.0, How.ALONE)
        return Again(0.0, How.LARGER) if choices.larger else None
    if kind == DiskFull.__name__:
        return Again(0.0, How.ROOMIER) if choices.roomier and How.ROOMIER not in tried else None
    if len(tried) >= ATTEMPTS.get(kind, 1):
        return None
    wait = min(max(2.0 ** (len(tried) - 1), failure.retry_after or 0.0), LONGEST_WAIT_SECONDS)
    return Again(wait)
