"""Store immutable files, written durably: to a scratch folder, synced, then moved by atomic rename.

An object is named after the sha256 of its content, as ROOT/objects/ab/abcdef...; it is never changed or removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.loopback.errors import InvalidRequest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES = 4 * 2**20


def sync_directory(path: Path) -> None:
    """Sync a directory, so that its entries survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each name synced in its parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


class Incoming:
    """A file being written: invisible until `keep` renames it to its final name, and deleted if `keep` isn't called."""

    def __init__(self, scratch: Path) -> None:
        # keep() or __exit__ closes it, maybe in different calls.
        self._file = tempfile.NamedTemporaryFile(dir=scratch, delete=False)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def sha256(self) -> str:
        """The sha256 of what was written so far, 64 hex digits."""
        return self._hash.hexdigest()

    def keep(self, path: Path) -> None:
        """Move the file to `path` durably, replacing an existing file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        make_directory(path.parent)
        Path(self._file.name).replace(path)
        sync_directory(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            # On a full disk close() fails, too; delete the file anyway.
            Path(self._file.name).unlink(missing_ok=True)


def write_file(path: Path, data: bytes, scratch: Path) -> None:
    """Write a whole file durably and atomically: readers see the old content or the new."""
    with Incoming(scratch) as incoming:
        incoming.write(data)
        incoming.keep(path)


class ObjectStore:
    """Immutable blobs by sha256, and the parts of multipart uploads.

    Parts are kept in the scratch folder, which a restart empties: interrupted multipart uploads start again.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root = root
        self.scratch = scratch
        # Two uploads of one object share their parts: the later one must see the whole object, not some of its parts.
        self._assembling = threading.Lock()

    def path(self, sha256: str) -> Path:
        """The path of an object, stored or not. Raises InvalidRequest if the name is no sha256."""
        if not _SHA256.fullmatch(sha256):
            raise InvalidRequest(f"an object is named by its sha256, 64 lower-case hex digits, got {sha256!r}")
        return self._root / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """The size of an object in bytes, None if it isn't stored."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, data: bytes) -> str:
        """Store bytes, return their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size(sha256) is None:
            write_file(self.path(sha256), data, self.scratch)
        return sha256

    def adopt(self, incoming: Incoming, sha256: str, size: int) -> None:
        """Store an upload under its announced sha256; InvalidRequest if its size or hash differ."""
        path = self.path(sha256)
        if (incoming.sha256, incoming.size) != (sha256, size):
            raise InvalidRequest(
                f"object {sha256}: got {incoming.size} bytes with sha256 {incoming.sha256}, "
                f"expected {size} bytes with that sha256; upload the file again"
            )
        if not path.exists():
            incoming.keep(path)

    def adopt_part(self, incoming: Incoming, sha256: str, number: int) -> str:
        """Keep one part of an object, return its tag for `assemble`."""
        incoming.keep(self._part(sha256, number, incoming.sha256))
        return incoming.sha256

    def assemble(self, sha256: str, size: int, parts: Sequence[tuple[int, str]]) -> None:
        """Join parts, given as (number, tag), into the object; InvalidRequest if one is missing or wrong."""
        with self._assembling:
            if self.size(sha256) is not None:
                return
            with Incoming(self.scratch) as whole:
                for number, tag in sorted(parts):
                    self._append(whole, sha256, number, tag)
                self.adopt(whole, sha256, size)
            shutil.rmtree(self._part(sha256, 0, "").parent, ignore_errors=True)

    def _append(self, whole: Incoming, sha256: str, number: int, tag: str) -> None:
        path = self._part(sha256, number, tag)
        if not _SHA256.fullmatch(tag) or not path.is_file():
            raise InvalidRequest(f"object {sha256}: part {number} with tag {tag!r} was never uploaded")
        with path.open("rb") as part:
            while chunk := part.read(_COPY_BYTES):
                whole.write(chunk)

    def _part(self, sha256: str, number: int, tag: str) -> Path:
        return self.scratch / f"parts-{self.path(sha256).name}" / f"{number}-{tag}"
