"""When a failed stage is tried again: a pure function of the error's class and how often it was tried."""

from __future__ import annotations

from workers.errors import HubUnavailable, StageHung, WorkerDied
from workers.job import Failure

# Attempts in all, by error class. Whatever isn't named here would fail the same way again.
ATTEMPTS = {HubUnavailable.__name__: 6, WorkerDied.__name__: 3, StageHung.__name__: 2}
LONGEST_WAIT_SECONDS = 300.0


def wait_before_retry(failure: Failure, attempts: int) -> float | None:
    """Seconds to wait before the next attempt, None to give up; ``attempts`` counts those made.

    Doubles from one second; a Hub's ``Retry-After`` is kept to, up to ``LONGEST_WAIT_SECONDS``.
    """
    if attempts >= ATTEMPTS.get(failure.kind, 1):
        return None
    return min(max(2.0 ** (attempts - 1), failure.retry_after or 0.0), LONGEST_WAIT_SECONDS)
