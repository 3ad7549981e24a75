"""Folders of any fsspec file system, in which files are written atomically."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError, HubRefused, ZooError

CHUNK = 4 << 20


class FileSystem:
    """Files below one root, a local path or a URL; ``named`` is the zoo key that sets it.

    Raises:
        ZooError: the file system is unknown, or its package isn't installed.
    """

    def __init__(self, url: str, named: str) -> None:
        from fsspec.core import url_to_fs

        self._named = named
        try:
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ZooError(
                f"{named}: no file system for {url!r} ({error}); install its package, or name another folder"
            ) from error
        self._root = str(root).rstrip("/")
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def check(self) -> None:
        """Check that this user may write to the root, as far as possible without writing.

        Raises:
            HubRefused: the root isn't writable or can't be reached.
        """
        if self._local:
            nearest = next(path for path in (Path(self._root), *Path(self._root).parents) if path.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
                raise HubRefused(f"{self._named}: {str(nearest)!r} is no folder that this user may write to")
        else:
            try:
                self._fs.exists(self._root)
            except OSError as error:
                raise HubRefused(f"{self._named}: {self._root!r} can't be reached ({error})") from error

    def shown(self, path: str) -> str:
        """The full path or URL of a path below the root."""
        return f"{self._root}/{path}"

    def read(self, path: str) -> bytes | None:
        """A small file's content; None if it doesn't exist."""
        try:
            return b"".join(self.chunks(path))
        except FileNotFoundError:
            return None

    def chunks(self, path: str) -> Iterator[bytes]:
        """A file's content in chunks of ``CHUNK`` bytes."""
        with self._fs.open(self.shown(path), "rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk

    def sha256(self, path: str) -> str:
        """The sha256 of a file's content, in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks(path):
            digest.update(chunk)
        return digest.hexdigest()

    def copy(self, source: Path, path: str, check: Callable[[str], None] = lambda sha256: None) -> str:
        """Copy a local file to ``path`` and return its sha256; if ``check`` raises, no file is left at ``path``.

        An object store publishes the name immediately: there, a file that fails the check is deleted.
        """
        target = self.shown(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        written = _partial_name(target) if self._local else target
        digest = hashlib.sha256()
        try:
            with source.open("rb") as content, self._fs.open(written, "wb") as sink:
                while chunk := content.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
            check(digest.hexdigest())
        except CheckpointError:
            self._fs.rm_file(written)
            raise
        if self._local:
            _rename_durably(written, target)
        return digest.hexdigest()

    def replace(self, path: str, content: bytes) -> None:
        """Replace a file atomically where the file system can: a local rename, or one PUT to an object store."""
        target = self.shown(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        written = _partial_name(target) if self._local else target
        self._fs.pipe_file(written, content)
        if self._local:
            _rename_durably(written, target)

    def clear(self, folder: str) -> None:
        """Remove partial files that a dead process left in a folder."""
        for path in self._fs.find(self.shown(folder)):
            if path.endswith(".partial") and path.rsplit("/", 1)[1].startswith("."):
                self._fs.rm_file(path)

    def remove_file(self, path: str) -> None:
        """Remove a file."""
        self._fs.rm_file(self.shown(path))

    def remove(self, folder: str, first: str) -> None:
        """Remove a folder; ``first`` is the file that marks it as complete."""
        self.remove_file(f"{folder}/{first}")
        self._fs.rm(self.shown(folder), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""
        try:
            return sorted(str(path).rstrip("/").rsplit("/", 1)[1] for path in self._fs.ls(self.shown(folder), False))
        except FileNotFoundError:
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of all files below a folder, except hidden and partial ones."""
        root = self.shown(folder)
        info_by_path: dict[str, dict[str, Any]] = self._fs.find(root, detail=True)
        sizes = {path.split(f"{root}/", 1)[1]: int(info["size"]) for path, info in info_by_path.items()}
        return {path: size for path, size in sizes.items() if not path.rsplit("/", 1)[-1].startswith(".")}


def _partial_name(path: str) -> str:
    folder, name = path.rsplit("/", 1)
    return f"{folder}/.{name}.{secrets.token_hex(4)}.partial"


def _rename_durably(partial: str, target: str) -> None:
    """Rename a local file to its final name after fsync."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    Path(partial).replace(target)
