"""Folders of any file system that fsspec knows, in which a file is there whole, or not at all."""

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
    """What lies below one root, a path of this machine or a URL; ``named`` is the key of the zoo that names it.

    Raises:
        ZooError: no such file system, or its package isn't installed.
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
        """Whether this user may write there, as far as it can be told without writing.

        Raises:
            HubRefused: not.
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
        """A path below the root as people know it."""
        return f"{self._root}/{path}"

    def read(self, path: str) -> bytes | None:
        """A small file's content, None if there's no such file."""
        try:
            return b"".join(self.chunks(path))
        except FileNotFoundError:
            return None

    def chunks(self, path: str) -> Iterator[bytes]:
        """A file's content, piece by piece."""
        with self._fs.open(self.shown(path), "rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk

    def sha256(self, path: str) -> str:
        """The identity of a file's content, in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks(path):
            digest.update(chunk)
        return digest.hexdigest()

    def copy(self, source: Path, path: str, check: Callable[[str], None] = lambda sha256: None) -> str:
        """Copy a local file there and return its sha256; what ``check`` raises at doesn't get its name.

        An object store gives names at once: there, what didn't pass is removed again.
        """
        target = self.shown(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        place = _aside(target) if self._local else target
        digest = hashlib.sha256()
        try:
            with source.open("rb") as content, self._fs.open(place, "wb") as sink:
                while chunk := content.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
            check(digest.hexdigest())
        except CheckpointError:
            self._fs.rm_file(place)
            raise
        if self._local:
            _settle(place, target)
        return digest.hexdigest()

    def replace(self, path: str, content: bytes) -> None:
        """Atomically where the file system can: a rename on this machine, one PUT to an object store."""
        target = self.shown(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        place = _aside(target) if self._local else target
        self._fs.pipe_file(place, content)
        if self._local:
            _settle(place, target)

    def clear(self, folder: str) -> None:
        """Remove what a process that died left half-written in a folder."""
        for path in self._fs.find(self.shown(folder)):
            if path.endswith(".partial") and path.rsplit("/", 1)[1].startswith("."):
                self._fs.rm_file(path)

    def remove_file(self, path: str) -> None:
        """Remove a file."""
        self._fs.rm_file(self.shown(path))

    def remove(self, folder: str, first: str) -> None:
        """Remove a folder; ``first`` the file in it that says that it's whole."""
        self.remove_file(f"{folder}/{first}")
        self._fs.rm(self.shown(folder), recursive=True)

    def names(self, folder: str) -> list[str]:
        """What a folder holds."""
        try:
            return sorted(str(path).rstrip("/").rsplit("/", 1)[1] for path in self._fs.ls(self.shown(folder), False))
        except FileNotFoundError:
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """All files below a folder with their sizes; without those that a dead process left half-written."""
        place = self.shown(folder)
        found: dict[str, dict[str, Any]] = self._fs.find(place, detail=True)
        sizes = {path.split(f"{place}/", 1)[1]: int(info["size"]) for path, info in found.items()}
        return {path: size for path, size in sizes.items() if not path.rsplit("/", 1)[-1].startswith(".")}


def _aside(path: str) -> str:
    folder, name = path.rsplit("/", 1)
    return f"{folder}/.{name}.{secrets.token_hex(4)}.partial"


def _settle(place: str, target: str) -> None:
    """Give a local file its name once its bytes are on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    Path(place).replace(target)
