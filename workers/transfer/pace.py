"""Limits the rate of requests and commits to a Hub, counted in one place; a 429 pauses all callers.

``Counters`` is pure: the caller passes the time. Other processes pass their own implementation of ``Pace``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from workers.spec.job import HubLimits

# Maximum pause in seconds, whatever the Hub asks for: at worst another 429 follows.
LONGEST_PAUSE_SECONDS = 300.0
# Pause in seconds after a 429 without Retry-After.
UNNAMED_PAUSE_SECONDS = 5.0


class Pace(Protocol):
    """Grants permits for requests to a Hub."""

    def ask(self, hub: str, commit_to: str | None, file: bool = False) -> float:
        """0 for a permit, which is counted immediately; otherwise the seconds after which to ask again.

        ``file``: the request downloads a file's content, for which a Hub has a higher limit than for its API.
        """

    def pause(self, hub: str, seconds: float) -> None:
        """Grant no permits for that Hub for ``seconds``."""


class Window:
    """At most ``limit`` events in any ``seconds``."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._events: deque[float] = deque()

    def wait(self, now: float) -> float:
        """Seconds until one more event is allowed; 0 if it is now."""
        while self._events and self._events[0] <= now - self._seconds:
            self._events.popleft()
        return 0.0 if len(self._events) < self._limit else self._events[0] + self._seconds - now

    def take(self, now: float) -> None:
        """Count one event."""
        self._events.append(now)


class Counters:
    """The windows and pauses of all Hubs."""

    def __init__(self, limits: HubLimits) -> None:
        self._limits = limits
        self._windows: dict[tuple[str, ...], Window] = {}
        self._paused_until: dict[str, float] = {}

    def ask(self, hub: str, commit_to: str | None, now: float, file: bool = False) -> float:
        """See ``Pace.ask``; an event is counted in all windows, or in none."""
        windows = [self._window(key) for key in _keys(hub, commit_to, file)]
        wait = max(self._paused_until.get(hub, now) - now, *(window.wait(now) for window in windows))
        if wait <= 0:
            for window in windows:
                window.take(now)
        return max(wait, 0.0)

    def pause(self, hub: str, until: float) -> None:
        """Grant no permits until then; a longer pause stays in effect."""
        self._paused_until[hub] = max(until, self._paused_until.get(hub, until))

    def _window(self, key: tuple[str, ...]) -> Window:
        limits = self._limits
        if key not in self._windows:
            match key:
                case (_, "requests"):
                    window = Window(limits.requests, limits.request_seconds)
                case (_, "files"):
                    window = Window(limits.files, limits.request_seconds)
                case (_, "commits"):
                    window = Window(limits.commits, limits.commit_seconds)
                case _:
                    window = Window(limits.commits_to_a_repository, limits.commit_seconds)
            self._windows[key] = window
        return self._windows[key]


def _keys(hub: str, commit_to: str | None, file: bool) -> list[tuple[str, ...]]:
    requests: tuple[str, ...] = (hub, "files" if file else "requests")
    return [requests] if commit_to is None else [requests, (hub, "commits"), (hub, "commits", commit_to)]


class LocalPace:
    """The pace of one process; served by an actor, that of a whole run."""

    def __init__(self, limits: HubLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._counters = Counters(limits or HubLimits())
        self._clock = clock
        self._lock = threading.Lock()

    def ask(self, hub: str, commit_to: str | None, file: bool = False) -> float:
        """See ``Pace``."""
        with self._lock:
            return self._counters.ask(hub, commit_to, self._clock(), file)

    def pause(self, hub: str, seconds: float) -> None:
        """See ``Pace``."""
        with self._lock:
            self._counters.pause(hub, self._clock() + min(seconds, LONGEST_PAUSE_SECONDS))
