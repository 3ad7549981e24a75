"""Shared storage: what lies between two stages, for the node that goes on when the one that made it is lost.

    ROOT/artifacts/<recipe>-<fingerprint>/...        as in the workspace, with what stands beside it there
                  /.../quantmill-kept.json           all of its files with their sha256; written last

A copy is taken back only if every byte is the one that was kept: what a dead worker left half-written counts as absent.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from workers.errors import DiskFull, HubRefused, HubUnavailable
from workers.machine.files import file_sha256
from workers.spec.base import Frozen
from workers.spec.job import FileEntry
from workers.spec.workspace import MANIFEST, folds_folder, layout_path, record_path
from workers.transfer.filesystems import FileSystem

KEPT = "quantmill-kept.json"
# Of an artifact's copy: its own files, and what stands beside it in the workspace.
OWN, BESIDE = "artifact", "beside"


class StorageManifest(Frozen):
    """``quantmill-kept.json``."""

    schema_version: int = 1
    files: dict[str, FileEntry]


class Storage:
    """The root that ``storage`` of a zoo names.

    Raises:
        ZooError: no such file system, or its package isn't installed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files = FileSystem(url, "storage")

    def check(self) -> None:
        """Whether this user may write there, as far as it can be told without writing.

        Raises:
            HubRefused: not.
        """
        self._files.check()

    def keep(self, place: Path) -> None:
        """Copy the artifact in a folder there; only what isn't there yet.

        Raises:
            HubRefused: this user may not write there.
            HubUnavailable: the file system failed, or is full.
        """
        with self._failing(place):
            folder, before = _name(place), self._kept(place)
            there = before.files if before else {}
            files = {}
            for path, source in _files(place):
                entry = FileEntry(sha256=file_sha256(source), size=source.stat().st_size)
                if there.get(path) != entry:
                    copied = self._files.copy(source, f"{folder}/{path}")
                    entry = entry.model_copy(update={"sha256": copied})
                files[path] = entry
            self._files.replace(
                f"{folder}/{KEPT}", StorageManifest(files=files).model_dump_json(indent=1).encode() + b"\n"
            )

    def restore(self, place: Path) -> bool:
        """Put the copy of an artifact into its folder, if there's a whole one; whether there was.

        Raises:
            HubRefused: this user may not read there.
            HubUnavailable: the file system failed.
        """
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with self._failing(place):
                kept = self._kept(place)
                whole = kept is not None and all(
                    self._take(f"{_name(place)}/{path}", partial / path, entry) for path, entry in kept.files.items()
                )
            if not whole:
                return False
            for path in (partial / BESIDE).glob("*"):
                target = place.parent / path.name
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)
            shutil.rmtree(place, ignore_errors=True)
            (partial / OWN).rename(place)
            return True
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def manifest(self, place: Path) -> bytes | None:
        """The manifest of an artifact's copy, if it has been verified."""
        with self._failing(place):
            kept = self._kept(place)
            return self._files.read(f"{_name(place)}/{OWN}/{MANIFEST}") if kept else None

    def remove(self, place: Path) -> None:
        """Remove the copy of an artifact, if there is one."""
        with self._failing(place):
            if self._kept(place) is not None:
                self._files.remove(_name(place), first=KEPT)

    def _kept(self, place: Path) -> StorageManifest | None:
        text = self._files.read(f"{_name(place)}/{KEPT}")
        try:
            kept = StorageManifest.model_validate_json(text) if text is not None else None
        except ValidationError:
            return None  # another version's
        parts = [PurePosixPath(path).parts for path in kept.files] if kept else []
        return kept if all(first in (OWN, BESIDE) and ".." not in rest for first, *rest in parts) else None

    def _take(self, path: str, target: Path, meant: FileEntry) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("wb") as sink:
                sink.writelines(self._files.chunks(path))
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left for {target} ({error}); free some, or choose another --out") from error
            raise
        return target.stat().st_size == meant.size and file_sha256(target) == meant.sha256

    @contextmanager
    def _failing(self, place: Path) -> Iterator[None]:
        try:
            yield
        except DiskFull:
            raise  # this node's own
        except PermissionError as error:
            raise HubRefused(f"storage {self._url!r}: {error}; let this user write there") from error
        except OSError as error:
            raise HubUnavailable(f"storage {self._url!r}, {place.name}: {type(error).__name__}: {error}") from error


def _name(place: Path) -> str:
    return f"artifacts/{place.name}"


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    """What is kept of an artifact, by its path in the copy."""
    for root, name in ((place, OWN), (folds_folder(place), f"{BESIDE}/{folds_folder(place).name}")):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield f"{name}/{path.relative_to(root)}", path
    for path in (layout_path(place), record_path(place)):
        if path.is_file():
            yield f"{BESIDE}/{path.name}", path
