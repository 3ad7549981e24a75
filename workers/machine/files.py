"""Checksums, a checkpoint's folder, bounded reads, atomic writes, and damaged files, which are set aside."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from workers.errors import CheckpointError, UserError
from workers.spec.base import canonical_json
from workers.spec.bounds import CONFIG_BYTES, FILES, INDEX_BYTES
from workers.spec.checkpoint_files import CONFIG, CheckpointFiles, checkpoint_files, folder_left_out

M = TypeVar("M", bound=BaseModel)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """Git's id of a file's content: sha1 of "blob", its size, and its bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def folder_sha256(folder: Path) -> str:
    """Identity of a folder: sha256 of the names and contents of all files that aren't hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return _names_sha256({str(path.relative_to(folder)): file_sha256(path) for path in visible})


def _names_sha256(names: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(names).encode()).hexdigest()


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """A file's content.

    Raises:
        CheckpointError: it is larger than ``limit`` bytes, or can't be read.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{what}: can't be read ({error.strerror}); mend its permissions") from error
    if len(content) > limit:
        raise CheckpointError(f"{what}: larger than {limit} bytes, which no real one is; replace it by the original")
    return content


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a file, at most ``count``."""
    with path.open("rb") as stream:
        return stream.read(count)


# ------------------------------------------------------------------------------------- a checkpoint's folder


@dataclass(frozen=True)
class _Listing:
    """Regular files by name relative to the folder, with sizes in bytes; links that lead outside, by name."""

    sizes: dict[str, int] = field(default_factory=dict)
    outside: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def open_checkpoint(
    folder: Path, what: str, *, variant: str | None = None, allow_pickle: bool = False
) -> CheckpointFiles:
    """Resolve which files of a folder are its checkpoint; ``what`` begins the messages.

    Raises:
        CheckpointError: see ``checkpoint_files``; or a file of the checkpoint is a link that leads out of the folder.
        UnsupportedModel: the weights are pickles, which aren't allowed.
    """
    listing = _listing(folder, what)

    def read(name: str) -> bytes:
        _refuse_outside([name], listing, what)
        return read_bounded(folder / name, CONFIG_BYTES if name == CONFIG else INDEX_BYTES, f"{what}: {name}")

    files = checkpoint_files(
        listing.sizes, read, what, variant=variant, allow_pickle=allow_pickle, left_out=listing.left_out
    )
    _refuse_outside(files.taken, listing, what)
    return files


def files_to_send(
    folder: Path, what: str, *, variant: str | None = None, allow_pickle: bool = False
) -> tuple[str, ...]:
    """Files of a model's folder that another machine needs to plan it: its checkpoint, or, if that can't be resolved,
    everything in it but links that lead outside, so that it's refused there with the reason."""
    try:
        return open_checkpoint(folder, what, variant=variant, allow_pickle=allow_pickle).taken
    except UserError:
        listing = _listing(folder, what)
        return tuple(sorted(name for name in listing.sizes if name not in listing.outside))


def checkpoint_sha256(folder: Path, files: CheckpointFiles) -> str:
    """Identity of a checkpoint in a folder: sha256 of the names and contents of its files."""
    return _names_sha256({name: file_sha256(folder / name) for name in files.taken})


def _refuse_outside(names: Iterable[str], listing: _Listing, what: str) -> None:
    for name in names:
        if name in listing.outside:
            raise CheckpointError(
                f"{what}: {name} is a link that leads out of the folder, to {listing.outside[name]}; put a copy of the "
                "file in its place"
            )


def _listing(folder: Path, what: str) -> _Listing:
    """List the files of a checkpoint's folder; folders that can't belong to it aren't looked into."""
    listing = _Listing()
    root = folder.resolve()
    # A snapshot in the Hub client's cache consists of links into the blobs of the same repository.
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for current, folders, names in os.walk(folder):
        below = Path(current).relative_to(folder)
        for name in list(folders):
            reason = "a link to a folder" if (Path(current) / name).is_symlink() else folder_left_out(name)
            if reason:
                folders.remove(name)
                listing.left_out[f"{(below / name).as_posix()}/"] = reason
        for name in names:
            _list_file(listing, Path(current) / name, (below / name).as_posix(), homes)
        if len(listing.sizes) > FILES:
            raise CheckpointError(f"{what}: more than {FILES} files, which no checkpoint has; name its own folder")
    return listing


def _list_file(listing: _Listing, path: Path, name: str, homes: list[Path]) -> None:
    try:
        target = path.resolve(strict=True) if path.is_symlink() else path
        found = path.stat()
    except (OSError, RuntimeError):  # a link to nothing, or in a circle
        listing.left_out[name] = "a link to nothing"
        return
    if not stat.S_ISREG(found.st_mode):
        listing.left_out[name] = "no regular file"
        return
    listing.sizes[name] = found.st_size
    if target is not path and not any(target.is_relative_to(home) for home in homes):
        listing.outside[name] = target


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
