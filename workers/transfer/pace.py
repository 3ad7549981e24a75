"""How fast the Hub may be asked: requests and commits are counted in one place, and a 429 pauses everybody.

``Counters`` is pure: the clock is the caller's. Who asks over a process's border brings a ``Pace`` of its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from workers.spec.job import HubLimits

# A pause that a Hub asks for is never taken for longer: what comes then is another 429, not a lost night.
LONGEST_PAUSE_SECONDS = 300.0
# What a 429 without Retry-After is worth.
UNNAMED_PAUSE_SECONDS = 5.0


class Pace(Protocol):
    """Hands out permits for requests to a Hub."""

    def ask(self, hub: str, commit_to: str | None, file: bool = False) -> float:
        """0 for a permit, which is counted at once; else the seconds after which to ask again.

        ``file``: the request is for a file's content, of which a Hub allows more than of those to its API.
        """

    def pause(self, hub: str, seconds: float) -> None:
        """Nobody gets a permit for that Hub for so long."""


class Window:
    """At most ``limit`` events in any ``seconds``."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._events: deque[float] = deque()

    def wait(self, now: float) -> float:
        """Seconds until there is room for one more; 0 if there is."""
        while self._events and self._events[0] <= now - self._seconds:
            self._events.popleft()
        return 0.0 if len(self._events) < self._limit else self._events[0] + self._seconds - now

    def take(self, now: float) -> None:
        """Count one."""
        self._events.append(now)


class Counters:
    """The windows of every Hub that is asked, and its pause."""

    def __init__(self, limits: HubLimits) -> None:
        self._limits = limits
        self._windows: dict[tuple[str, ...], Window] = {}
        self._paused_until: dict[str, float] = {}

    def ask(self, hub: str, commit_to: str | None, now: float, file: bool = False) -> float:
        """As ``Pace.ask`` says: all windows have room and count it, or none does."""
        windows = [self._window(key) for key in _keys(hub, commit_to, file)]
        wait = max(self._paused_until.get(hub, now) - now, *(window.wait(now) for window in windows))
        if wait <= 0:
            for window in windows:
                window.take(now)
        return max(wait, 0.0)

    def pause(self, hub: str, until: float) -> None:
        """Until then nobody gets a permit; an earlier, longer pause stays."""
        self._paused_until[hub] = max(until, self._paused_until.get(hub, until))

    def _window(self, key: tuple[str, ...]) -> Window:
        limits = self._limits
        if key not in self._windows:
            match key:
                case (_, "requests"):
                    made = Window(limits.requests, limits.request_seconds)
                case (_, "files"):
                    made = Window(limits.files, limits.request_seconds)
                case (_, "commits"):
                    made = Window(limits.commits, limits.commit_seconds)
                case _:
                    made = Window(limits.commits_to_a_repository, limits.commit_seconds)
            self._windows[key] = made
        return self._windows[key]


def _keys(hub: str, commit_to: str | None, file: bool) -> list[tuple[str, ...]]:
    requests: tuple[str, ...] = (hub, "files" if file else "requests")
    return [requests] if commit_to is None else [requests, (hub, "commits"), (hub, "commits", commit_to)]


class LocalPace:
    """The pace of one process; behind an actor it is that of a whole run."""

    def __init__(self, limits: HubLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._counters = Counters(limits or HubLimits())
        self._clock = clock
        self._lock = threading.Lock()

    def ask(self, hub: str, commit_to: str | None, file: bool = False) -> float:
        """As ``Pace`` says."""
        with self._lock:
            return self._counters.ask(hub, commit_to, self._clock(), file)

    def pause(self, hub: str, seconds: float) -> None:
        """As ``Pace`` says."""
        with self._lock:
            self._counters.pause(hub, self._clock() + min(seconds, LONGEST_PAUSE_SECONDS))
