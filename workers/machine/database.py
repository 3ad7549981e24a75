"""Opens an SQLite file that may be damaged, of another version, or locked. Standard library only."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from workers.errors import ZooError
from workers.machine.files import set_aside

# Seconds that a file locked by another program is waited for when it is opened, and at each use afterwards.
OPEN_SECONDS, USE_SECONDS = 30.0, 5.0
# SQLite's codes of what setting the file aside doesn't mend.
NOT_THE_FILES_FAULT = frozenset(
    {
        *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM),
    }
)


def open_database(
    path: Path, schema: str, columns: Mapping[str, Sequence[str]], seconds: float = OPEN_SECONDS
) -> sqlite3.Connection:
    """Open a file with these tables and columns; one that lacks them, or is damaged, is set aside for a new one.

    Raises:
        ZooError: another program keeps it locked, or it can't be opened.
    """
    if path.is_dir():
        set_aside(path, "is a folder")
    for _ in range(2):
        try:
            connection = sqlite3.connect(path, timeout=seconds, check_same_thread=False)
            problem = _prepared(connection, schema, columns)
        except (sqlite3.Error, ValueError) as error:
            if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_THE_FILES_FAULT:
                raise _unusable(path, error, seconds) from error
            problem = str(error)
        if problem is None:
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * min(USE_SECONDS, seconds))}")
            return connection
        connection.close()
        if set_aside(path, f"is damaged or of another version ({problem})") is None:
            break
    raise ZooError(f"{path}: no database can be made there ({problem}); remove it, or name another folder")


def _prepared(connection: sqlite3.Connection, schema: str, columns: Mapping[str, Sequence[str]]) -> str | None:
    """What is wrong with the file, None if nothing; missing tables are made."""
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        return str(state)
    connection.executescript(schema)
    for table, names in columns.items():
        present = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if lacking := [name for name in names if name not in present]:
            return f"table {table} has no {', '.join(lacking)}"
    return None


def _unusable(path: Path, error: sqlite3.Error, seconds: float) -> ZooError:
    if "locked" in str(error) or "busy" in str(error):
        return ZooError(
            f"{path}: another program keeps it locked, waited for {seconds:.0f} s; end that program (`fuser {path}` "
            "names it), or name another --out"
        )
    return ZooError(f"{path}: can't be opened ({error}); check its permissions, or name another --out")
