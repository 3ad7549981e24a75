"""Lease artifacts to drivers, so that two with the same destination don't make one twice; leases expire."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from workers.errors import QuantmillError, ZooError
from workers.machine.database import open_database
from workers.spec.job import Job, Manifest, Order

# A lease expires this long after its last renewal; drivers renew (heartbeat) this often.
LEASE_SECONDS, RENEW_SECONDS = 90.0, 15.0
# Interval between attempts to lease a job that another driver holds.
ASK_SECONDS = 10.0
UNLEASED = "leases can't be used, so that another run may make the same artifacts meanwhile, which does no harm"
SCHEMA = "CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL)"


class Leases(Protocol):
    """Which driver makes which artifact."""

    def take(self, owner: str, keys: Sequence[str]) -> bool:
        """Take or renew all of the keys; takes none and returns False if another living driver holds one of them."""

    def drop(self, owner: str, keys: Sequence[str]) -> None:
        """Release keys."""


class LeaseTable:
    """Leases in SQLite: in a file for a user's drivers on one machine, in an actor's memory for a cluster's."""

    def __init__(
        self,
        path: str = ":memory:",
        clock: Callable[[], float] = time.time,
        alive: Callable[[str], bool] = lambda owner: True,
    ) -> None:
        self._clock, self._alive = clock, alive
        self._connection = open_database(Path(path), SCHEMA, {"leases": ("key", "owner", "expires")})
        self._connection.isolation_level = None

    def take(self, owner: str, keys: Sequence[str]) -> bool:
        """See ``Leases``."""
        now = self._clock()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute("DELETE FROM leases WHERE expires < ?", (now,))
            query = "SELECT owner FROM leases WHERE key = ? AND owner != ?"
            owners = [self._connection.execute(query, (key, owner)).fetchone() for key in keys]
            holders = {str(row[0]) for row in owners if row}
            if any(self._alive(holder) for holder in holders):
                return False
            rows = [(key, owner, now + LEASE_SECONDS) for key in keys]
            self._connection.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", rows)
            return True
        finally:
            self._connection.execute("COMMIT")

    def drop(self, owner: str, keys: Sequence[str]) -> None:
        """See ``Leases``."""
        rows = [(key, owner) for key in keys]
        self._connection.executemany("DELETE FROM leases WHERE key = ? AND owner = ?", rows)


def of_this_machine() -> LeaseTable:
    """The leases of this user's drivers on this machine; leases of processes that ended don't count.

    Without a file that can be used, this process's alone: publishing twice is safe, it only costs the work.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantmill"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return LeaseTable(str(folder / "leases.sqlite"), alive=_lives)
    except (OSError, ZooError, sqlite3.Error) as error:
        print(f"quantmill: {UNLEASED} ({error})", file=sys.stderr, flush=True)
        return LeaseTable()


def new_owner(run_id: str) -> str:
    """A driver's unique name: run id, pid, and start time of the process."""
    return f"{run_id} {os.getpid()} {_started(os.getpid())}"


class Holder:
    """The leases of one driver, on the artifacts of its jobs at their destination.

    ``standing`` looks up an artifact at its destination, where another driver may have published it meanwhile.
    """

    def __init__(
        self, leases: Leases, owner: str, standing: Callable[[Job, Order], tuple[Manifest, str | None] | None]
    ) -> None:
        self._leases, self._owner, self._standing = leases, owner, standing
        self._held: dict[int, list[str]] = {}

    def hold(self, index: int, job: Job) -> bool:
        """Lease a job's artifacts; False while another driver holds one of them."""
        keys = _keys(job)
        taken = self._take(keys)
        if taken:
            self._held[index] = keys
        return taken

    def let_go(self, index: int) -> None:
        """Release a job's leases, because it is done or given up."""
        if keys := self._held.pop(index, None):
            self._tolerant(lambda: self._leases.drop(self._owner, keys))

    def close(self) -> None:
        """Release all leases, because the run is over."""
        for index in list(self._held):
            self.let_go(index)

    def renew(self) -> None:
        """Renew all leases (heartbeat)."""
        if keys := [key for held in self._held.values() for key in held]:
            self._take(keys)

    def _take(self, keys: Sequence[str]) -> bool:
        return self._tolerant(lambda: self._leases.take(self._owner, keys)) is not False

    def _tolerant(self, action: Callable[[], bool | None]) -> bool | None:
        """Use the leases; go on without, once a file that was fine at the start can't be used any more."""
        try:
            return action()
        except sqlite3.Error as error:
            print(f"quantmill: {UNLEASED} ({error})", file=sys.stderr, flush=True)
            self._leases = LeaseTable()
            return None

    def existing(self, job: Job) -> dict[str, tuple[Manifest, str | None]]:
        """The artifacts of a job that exist at its destination now: manifest and commit, by recipe.

        One that the destination refuses to show is as good as missing: its own stage will say why.
        """

        def find(order: Order) -> tuple[Manifest, str | None] | None:
            with suppress(QuantmillError):
                return self._standing(job, order)
            return None

        standing = {order.recipe.name: find(order) for order in job.orders}
        return {recipe: artifact for recipe, artifact in standing.items() if artifact is not None}


def _keys(job: Job) -> list[str]:
    destination = job.destination.endpoint if job.destination else job.workspace
    return [f"{destination} {order.repo_id} {order.fingerprint}" for order in job.orders]


def _lives(owner: str) -> bool:
    *_, pid, started = ["", *owner.rsplit(" ", 2)]
    return pid.isdecimal() and _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process of this machine was started, in clock ticks since boot; empty if it doesn't exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
