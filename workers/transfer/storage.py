"""Shared storage: keeps artifacts between two stages, so that another node can continue after the maker is lost.

    ROOT/artifacts/<recipe>-<fingerprint>/...        as in the workspace, with the files beside it there
                  /.../quantmill-kept.json           all of its files with their sha256; written last

A copy is restored only if every file's sha256 matches: partial copies of a dead worker count as absent.
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
# Subfolders of an artifact's copy: its own files, and the files beside it in the workspace.
OWN, BESIDE = "artifact", "beside"


class StorageManifest(Frozen):
    """``quantmill-kept.json``."""

    schema_version: int = 1
    files: dict[str, FileEntry]


class Storage:
    """The root folder set by ``storage`` in a zoo.

    Raises:
        ZooError: the file system is unknown, or its package isn't installed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files = FileSystem(url, "storage")

    def check(self) -> None:
        """Check that this user may write to the root, as far as possible without writing.

        Raises:
            HubRefused: the root isn't writable.
        """
        self._files.check()

    def keep(self, folder: Path) -> None:
        """Copy the artifact in a folder to the storage; files already there are skipped.

        Raises:
            HubRefused: this user may not write there.
            HubUnavailable: the file system failed, or is full.
        """
        with self._failing(folder):
            copy_folder, before = _name(folder), self._stored_manifest(folder)
            stored_files = before.files if before else {}
            files = {}
            for path, source in _files(folder):
                entry = FileEntry(sha256=file_sha256(source), size=source.stat().st_size)
                if stored_files.get(path) != entry:
                    copied = self._files.copy(source, f"{copy_folder}/{path}")
                    entry = entry.model_copy(update={"sha256": copied})
                files[path] = entry
            self._files.replace(
                f"{copy_folder}/{KEPT}", StorageManifest(files=files).model_dump_json(indent=1).encode() + b"\n"
            )

    def restore(self, folder: Path) -> bool:
        """Restore an artifact's complete copy into its folder; return whether there was one.

        Raises:
            HubRefused: this user may not read there.
            HubUnavailable: the file system failed.
        """
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with self._failing(folder):
                stored = self._stored_manifest(folder)
                whole = stored is not None and all(
                    self._take(f"{_name(folder)}/{path}", partial / path, entry) for path, entry in stored.files.items()
                )
            if not whole:
                return False
            for path in (partial / BESIDE).glob("*"):
                target = folder.parent / path.name
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)
            shutil.rmtree(folder, ignore_errors=True)
            (partial / OWN).rename(folder)
            return True
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def manifest(self, folder: Path) -> bytes | None:
        """The manifest of an artifact's copy, if the artifact has been verified."""
        with self._failing(folder):
            stored = self._stored_manifest(folder)
            return self._files.read(f"{_name(folder)}/{OWN}/{MANIFEST}") if stored else None

    def remove(self, folder: Path) -> None:
        """Remove the copy of an artifact, if there is one."""
        with self._failing(folder):
            if self._stored_manifest(folder) is not None:
                self._files.remove(_name(folder), first=KEPT)

    def _stored_manifest(self, folder: Path) -> StorageManifest | None:
        text = self._files.read(f"{_name(folder)}/{KEPT}")
        try:
            stored = StorageManifest.model_validate_json(text) if text is not None else None
        except ValidationError:
            return None  # written by another version
        parts = [PurePosixPath(path).parts for path in stored.files] if stored else []
        return stored if all(first in (OWN, BESIDE) and ".." not in rest for first, *rest in parts) else None

    def _take(self, path: str, target: Path, entry: FileEntry) -> bool:
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
        return target.stat().st_size == entry.size and file_sha256(target) == entry.sha256

    @contextmanager
    def _failing(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except DiskFull:
            raise  # this node's disk, not the storage
        except PermissionError as error:
            raise HubRefused(f"storage {self._url!r}: {error}; let this user write there") from error
        except OSError as error:
            raise HubUnavailable(f"storage {self._url!r}, {folder.name}: {type(error).__name__}: {error}") from error


def _name(folder: Path) -> str:
    return f"artifacts/{folder.name}"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of an artifact to copy, with their paths in the copy."""
    for root, name in ((folder, OWN), (folds_folder(folder), f"{BESIDE}/{folds_folder(folder).name}")):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield f"{name}/{path.relative_to(root)}", path
    for path in (layout_path(folder), record_path(folder)):
        if path.is_file():
            yield f"{BESIDE}/{path.name}", path
