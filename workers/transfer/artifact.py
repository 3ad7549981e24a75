"""A verified artifact on disk: its manifest, checked against the bytes, and what a destination would call them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from workers.errors import CheckpointError, HubRefused
from workers.machine.files import file_sha256
from workers.spec.job import FileEntry, Manifest
from workers.spec.workspace import MANIFEST

# Above, a file is never kept in git itself, and so never called by its git identity.
LARGEST_IN_GIT = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """An accepted artifact; ``sha256`` and ``blobs`` (git blob sha1) are by path, the manifest's own included."""

    folder: Path
    manifest: Manifest
    sha256: Mapping[str, str]
    blobs: Mapping[str, str]
    sizes: Mapping[str, int]

    def is_at(self, path: str, identity: str) -> bool:
        """Whether a file is what a Hub shows by that sha256 (LFS) or git blob sha1."""
        return identity in (self.sha256.get(path), self.blobs.get(path))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    @property
    def message(self) -> str:
        """The title of its commit."""
        manifest = self.manifest
        return f"{manifest.recipe.name} of {Path(manifest.model).name}@{manifest.revision[:12]}"

    def read(self, path: str) -> bytes:
        """A small file's content, if it's still the verified one.

        Raises:
            CheckpointError: it isn't.
        """
        data = (self.folder / path).read_bytes()
        self.check(path, hashlib.sha256(data).hexdigest())
        return data

    def check(self, path: str, sha256: str) -> None:
        """Stop if a file isn't the verified one any more."""
        if sha256 != self.sha256[path]:
            raise CheckpointError(f"artifact {self.folder}: {path} changed since it was verified; run its zoo again")


class Recorded(BaseModel):
    """What of a published manifest, also another version's, tells whether its files are still those."""

    fingerprint: str
    files: dict[str, FileEntry]


def recorded(text: bytes) -> Recorded | None:
    """That part of a manifest's text; None if it is none."""
    try:
        return Recorded.model_validate_json(text)
    except ValidationError:
        return None


def open_accepted(folder: Path) -> Artifact:
    """The artifact in a folder, if its bytes are the verified ones and were accepted.

    Raises:
        CheckpointError: as ``check_bytes`` says.
        HubRefused: the artifact was rejected.
    """
    manifest = check_bytes(folder)
    if not manifest.verdict.accepted:
        raise HubRefused(f"publish: {folder} was rejected ({'; '.join(manifest.verdict.reasons)}); it stays here")
    sha256 = {
        **{name: entry.sha256 for name, entry in manifest.files.items()},
        MANIFEST: file_sha256(folder / MANIFEST),
    }
    sizes = {name: (folder / name).stat().st_size for name in sorted(sha256)}
    blobs = {name: _git_blob_sha1(folder / name) for name, size in sizes.items() if size < LARGEST_IN_GIT}
    return Artifact(folder, manifest, sha256, blobs, sizes)


def check_bytes(folder: Path) -> Manifest:
    """The artifact's manifest, after its sha256 of every file was compared with the bytes on disk.

    Raises:
        CheckpointError: no manifest, a file changed since it was verified, one too many or one missing.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0][:200]
        raise CheckpointError(f"artifact {folder}: no readable {MANIFEST} ({first}); run its zoo again") from error
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    present = {str(path.relative_to(folder)) for path in files} - {MANIFEST}
    if present != set(manifest.files):
        odd = sorted(present ^ set(manifest.files))
        raise CheckpointError(f"artifact {folder}: files differ from the manifest, got {odd}; run its zoo again")
    for name, entry in manifest.files.items():
        if file_sha256(folder / name) != entry.sha256:
            raise CheckpointError(f"artifact {folder}: {name} changed since it was verified; run its zoo again")
    return manifest


def _git_blob_sha1(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
