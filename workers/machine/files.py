"""Checksums of files and folders, and atomic writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from workers.spec.base import canonical_json


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
