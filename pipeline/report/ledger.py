"""Record runs and the attempts of their stages, with results, in an SQLite ledger beside the runs."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.machine.database import open_database
from workers.spec.job import StageResult

# Status of a run whose driver was killed.
DIED = "died"
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, zoo TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT, status TEXT);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, run_id TEXT NOT NULL REFERENCES runs, model TEXT NOT NULL, revision TEXT NOT NULL,
    recipe TEXT, fingerprint TEXT, stage TEXT NOT NULL, attempt INTEGER NOT NULL, node TEXT NOT NULL,
    finished_at TEXT NOT NULL, seconds REAL NOT NULL, outcome TEXT NOT NULL, error TEXT);
CREATE INDEX IF NOT EXISTS attempts_of_run ON attempts (run_id);
"""

COLUMNS = {
    "runs": ("run_id", "zoo", "started_at", "finished_at", "status"),
    "attempts": (
        *("id", "run_id", "model", "revision", "recipe", "fingerprint", "stage", "attempt", "node"),
        *("finished_at", "seconds", "outcome", "error"),
    ),
}


def now() -> str:
    """The current UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Attempt:
    """One attempt of a stage."""

    model: str
    revision: str
    recipe: str | None
    fingerprint: str | None
    attempt: int


class Ledger:
    """The ledger of one output folder. Every entry is committed immediately.

    A damaged file is set aside for a new one.

    Raises:
        ZooError: another program keeps it locked.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._connection = open_database(out / "ledger.sqlite", SCHEMA, COLUMNS)
        self._connection.row_factory = sqlite3.Row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def start(self, run_id: str, zoo: str, started_at: str) -> None:
        """Insert a run."""
        with self._connection as connection:
            connection.execute("INSERT INTO runs (run_id, zoo, started_at) VALUES (?, ?, ?)", (run_id, zoo, started_at))

    def finish(self, run_id: str, finished_at: str, status: str) -> None:
        """Record a run's end and status."""
        with self._connection as connection:
            connection.execute(
                "UPDATE runs SET finished_at = ?, status = ? WHERE run_id = ?", (finished_at, status, run_id)
            )

    def bury(self) -> None:
        """Record that runs without an end died; only for the process that holds the output folder's lock."""
        with self._connection as connection:
            connection.execute("UPDATE runs SET status = ? WHERE finished_at IS NULL AND status IS NULL", (DIED,))

    def record(self, run_id: str, attempt: Attempt, result: StageResult) -> None:
        """Insert one attempt of a stage and its result."""
        failure = result.failure
        row = (
            *(run_id, attempt.model, attempt.revision, attempt.recipe, attempt.fingerprint),
            *(result.stage.value, attempt.attempt, result.node, now(), result.seconds),
            *("failed" if failure else "ok", f"{failure.kind}: {failure.message}" if failure else None),
        )
        with self._connection as connection:
            connection.execute(
                "INSERT INTO attempts (run_id, model, revision, recipe, fingerprint, stage, attempt, node,"
                " finished_at, seconds, outcome, error) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def runs(self) -> list[sqlite3.Row]:
        """All runs, newest first."""
        with closing(self._connection.execute("SELECT * FROM runs ORDER BY started_at DESC, rowid DESC")) as cursor:
            return cursor.fetchall()

    def attempts(self, run_id: str) -> list[sqlite3.Row]:
        """The attempts of a run's stages, in the order in which they ended."""
        query = "SELECT * FROM attempts WHERE run_id = ? ORDER BY id"
        with closing(self._connection.execute(query, (run_id,))) as cursor:
            return cursor.fetchall()
