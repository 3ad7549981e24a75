"""Leases: two drivers at work for the same place don't make the same artifact twice. They expire with their driver."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from workers.spec.job import Job, Manifest, Order

# A lease ends this long after its driver was last heard of, and a driver is heard of this often.
LEASE_SECONDS, RENEW_SECONDS = 90.0, 15.0
# How often a job that another driver holds is asked for again.
ASK_SECONDS = 10.0
SCHEMA = "CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL)"


class Leases(Protocol):
    """Who makes what."""

    def take(self, owner: str, keys: Sequence[str]) -> bool:
        """Take all of the keys, or keep them; none if another living driver holds one of them."""

    def drop(self, owner: str, keys: Sequence[str]) -> None:
        """Give keys back."""


class LeaseTable:
    """Leases in SQLite: of all drivers of a user on one machine in a file, of a cluster's in an actor's memory."""

    def __init__(
        self,
        path: str = ":memory:",
        clock: Callable[[], float] = time.time,
        alive: Callable[[str], bool] = lambda owner: True,
    ) -> None:
        self._clock, self._alive = clock, alive
        self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._connection.execute(SCHEMA)

    def take(self, owner: str, keys: Sequence[str]) -> bool:
        """As ``Leases`` says."""
        now = self._clock()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute("DELETE FROM leases WHERE expires < ?", (now,))
            query = "SELECT owner FROM leases WHERE key = ? AND owner != ?"
            found = [self._connection.execute(query, (key, owner)).fetchone() for key in keys]
            holders = {str(row[0]) for row in found if row}
            if any(self._alive(holder) for holder in holders):
                return False
            rows = [(key, owner, now + LEASE_SECONDS) for key in keys]
            self._connection.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", rows)
            return True
        finally:
            self._connection.execute("COMMIT")

    def drop(self, owner: str, keys: Sequence[str]) -> None:
        """As ``Leases`` says."""
        rows = [(key, owner) for key in keys]
        self._connection.executemany("DELETE FROM leases WHERE key = ? AND owner = ?", rows)


def of_this_machine() -> LeaseTable:
    """The leases of this user's drivers on this machine; those of processes that are gone count no more."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantmill"
    folder.mkdir(parents=True, exist_ok=True)
    return LeaseTable(str(folder / "leases.sqlite"), alive=_lives)


def new_owner(run_id: str) -> str:
    """A driver's name: its run, and the process that it is."""
    return f"{run_id} {os.getpid()} {_started(os.getpid())}"


class Holder:
    """What one driver holds: the artifacts of its jobs, at the place that they're published at.

    ``standing`` looks there for what another driver has made meanwhile.
    """

    def __init__(
        self, leases: Leases, owner: str, standing: Callable[[Job, Order], tuple[Manifest, str | None] | None]
    ) -> None:
        self._leases, self._owner, self._standing = leases, owner, standing
        self._held: dict[int, list[str]] = {}

    def hold(self, index: int, job: Job) -> bool:
        """Take a job's artifacts; False while another driver is at one of them."""
        keys = _keys(job)
        taken = self._leases.take(self._owner, keys)
        if taken:
            self._held[index] = keys
        return taken

    def let_go(self, index: int) -> None:
        """The job is done, or given up."""
        if keys := self._held.pop(index, None):
            self._leases.drop(self._owner, keys)

    def renew(self) -> None:
        """Be heard of."""
        if keys := [key for held in self._held.values() for key in held]:
            self._leases.take(self._owner, keys)

    def made(self, job: Job) -> dict[str, tuple[Manifest, str | None]]:
        """Those of a job's artifacts that stand there now: manifest and commit, by recipe."""
        found = {order.recipe.name: self._standing(job, order) for order in job.orders}
        return {recipe: there for recipe, there in found.items() if there is not None}


def _keys(job: Job) -> list[str]:
    place = job.destination.endpoint if job.destination else job.workspace
    return [f"{place} {order.repo_id} {order.fingerprint}" for order in job.orders]


def _lives(owner: str) -> bool:
    _, pid, started = owner.rsplit(" ", 2)
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process of this machine was started, in ticks since it booted; empty if there's none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
