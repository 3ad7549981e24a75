"""Decide whether and how a failed stage is retried, from the error's class and earlier attempts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from workers.errors import DeviceLost, DiskFull, HubUnavailable, OutOfMemory, StageHung, WorkerDied
from workers.spec.job import Failure

# Attempts in all, by error class. Errors named neither here nor in `decide` are permanent: no retry.
ATTEMPTS = {HubUnavailable.__name__: 6, WorkerDied.__name__: 3, StageHung.__name__: 2, DeviceLost.__name__: 3}
LONGEST_WAIT_SECONDS = 300.0


class RetryMode(Enum):
    """How a stage is retried."""

    SAME = "as it was"
    ALONE = "alone on its node, and in the smallest micro-batches"
    LARGER = "on a node with more memory"
    ROOMIER = "on a node with more disk"


@dataclass(frozen=True)
class Retry:
    """Retry after ``seconds``, in this mode."""

    seconds: float
    mode: RetryMode = RetryMode.SAME


@dataclass(frozen=True)
class Choices:
    """Whether the cluster has nodes with more memory (``larger``) or disk (``roomier``) for a failed stage."""

    larger: bool = False
    roomier: bool = False


NO_CHOICE = Choices()


def decide(failure: Failure, before: Sequence[tuple[str, RetryMode]], choices: Choices = NO_CHOICE) -> Retry | None:
    """The retry of a failed stage; None: give up.

    ``before`` lists every failed attempt so far, this one last, as error class and mode. Transient errors back off
    exponentially (1 s, doubled each time); a Hub's ``Retry-After`` is kept, up to ``LONGEST_WAIT_SECONDS``. A stage
    that ran out of memory or disk is never retried in the same mode on the same node.
    """
    kind = failure.kind
    tried = [mode for name, mode in before if name == kind]
    if kind == OutOfMemory.__name__:
        # First alone on its node: delays other stages, but downloads nothing. A larger node comes last.
        if RetryMode.ALONE not in tried:
            return Retry(0.0, RetryMode.ALONE)
        return Retry(0.0, RetryMode.LARGER) if choices.larger else None
    if kind == DiskFull.__name__:
        return Retry(0.0, RetryMode.ROOMIER) if choices.roomier and RetryMode.ROOMIER not in tried else None
    if len(tried) >= ATTEMPTS.get(kind, 1):
        return None
    wait = min(max(2.0 ** (len(tried) - 1), failure.retry_after or 0.0), LONGEST_WAIT_SECONDS)
    return Retry(wait)
