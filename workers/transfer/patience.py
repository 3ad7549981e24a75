"""Retries calls to a Hub: every call has a timeout, and all of them share one deadline."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from workers.errors import HubUnavailable

T = TypeVar("T")

PUBLISH_SECONDS = 1800.0
# Most seconds that the plan waits for an address at which nothing answers: it's more often wrong than down.
SILENT_SECONDS = 20.0
CALL_SECONDS = 300.0
# Minimum expected throughput in bytes per second; a slower transfer counts as stalled.
BYTES_PER_SECOND = 256 * 1024
LONGEST_BACKOFF_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 300.0


def transfer_seconds(size: int) -> float:
    """Maximum duration in seconds of a transfer of ``size`` bytes."""
    return size / BYTES_PER_SECOND


class Silence:
    """Since when nothing has answered at an address; shared by all who call there."""

    def __init__(self, seconds: float = SILENT_SECONDS) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def broken(self) -> None:
        """Something answered."""
        self._since = None

    def lasts(self, now: float, wait: float) -> bool:
        """Note another call without an answer; whether that would be so for too long after another ``wait``."""
        self._since = now if self._since is None else self._since
        return now + wait - self._since >= self._seconds


class Patience:
    """Retries calls that get no answer, until a common deadline after ``seconds``, or until a ``silence`` lasts."""

    def __init__(
        self,
        seconds: float = PUBLISH_SECONDS,
        *,
        call_seconds: float = CALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        silence: Silence | None = None,
    ) -> None:
        self._silence = silence
        self._call_seconds = call_seconds
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._seconds = seconds
        self._deadline = clock() + seconds

    def call(self, thing: str, action: Callable[[], T], extra_seconds: float = 0.0) -> T:
        """Run the action, with retries, and return its result.

        Raises:
            HubUnavailable: the last failure, if the deadline leaves no time for another attempt.
        """
        failures = 0
        while True:
            try:
                result = self.once(thing, action, extra_seconds)
            except HubUnavailable as error:
                failures += 1
                self.wait(error, failures)
            else:
                if self._silence is not None:
                    self._silence.broken()
                return result

    def once(self, thing: str, action: Callable[[], T], extra_seconds: float = 0.0) -> T:
        """Run the action once and return its result; HubUnavailable after the timeout.

        The client's own timeout covers a single read: it bounds neither a trickling answer, nor an hours-long wait that
        the Hub requests. A timed-out action ends by itself, or with the process.
        """
        seconds = min(self._call_seconds + extra_seconds, max(self._deadline - self._clock(), 0.0))
        answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                answers.put((action(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=work, name=thing, daemon=True).start()
        try:
            result, error = answers.get(timeout=seconds)
        except Empty:
            raise HubUnavailable(f"{thing}: no whole answer in {seconds:.0f} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where T has it

    def wait(self, error: HubUnavailable, failures: int) -> None:
        """Sleep before the next attempt: exponential backoff with jitter, at least the Hub's requested wait (bounded).

        Raises:
            HubUnavailable: the given error, if the deadline leaves no time for another attempt.
        """
        if isinstance(error.__cause__, HubUnavailable):
            raise error  # already retried
        backoff = min(2.0 ** (failures - 1), LONGEST_BACKOFF_SECONDS) * (0.5 + 0.5 * self._jitter())
        wait = max(backoff, min(error.retry_after or 0.0, LONGEST_WAIT_SECONDS))
        if self._silence is not None:
            if error.reached:
                self._silence.broken()
            elif self._silence.lasts(self._clock(), wait):
                raise error
        if self._clock() + wait >= self._deadline:
            message = f"{error}; given up after {failures} attempts, for {self._seconds:.0f} s in all are over"
            raise HubUnavailable(message, error.retry_after) from error
        self._sleep(wait)


def insist(thing: str, action: Callable[[], T], silence: Silence | None = None) -> T:
    """Run a short request with the patience of publishing, and return its result.

    ``silence`` is shared by the requests of one command, which gives up early on an address where nothing answers.

    Raises:
        HubUnavailable: the last failure.
    """
    return Patience(silence=silence or Silence()).call(thing, action)
