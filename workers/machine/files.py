"""Checksums of files and folders, atomic writes, and damaged files, which are set aside."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from workers.spec.base import canonical_json

M = TypeVar("M", bound=BaseModel)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Identity of a folder: sha256 of the names and contents of all files that aren't hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    names = {str(path.relative_to(folder)): file_sha256(path) for path in visible}
    return hashlib.sha256(canonical_json(names).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: fsync, then rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def set_aside(path: Path, why: str) -> Path | None:
    """Rename a damaged file to ``NAME.damaged-TIME``, with what SQLite keeps beside it, and say so on stderr.

    Returns the new path; None if there was nothing to rename.
    """
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    for suffix in ("-journal", "-wal", "-shm"):
        with suppress(OSError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    print(f"quantmill: {path} {' '.join(why.split())}; set aside as {aside.name}", file=sys.stderr, flush=True)
    return aside


def read_model(path: Path, kind: type[M]) -> M | None:
    """A file's JSON as a model; None if there is no such file, or it can't be read: then it is set aside."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        set_aside(path, f"isn't readable ({str(error).splitlines()[0]})")
        return None
