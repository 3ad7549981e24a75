"""A verified artifact on disk: checks its manifest against the bytes, and computes its Hub identities."""

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

# Size in bytes above which a Hub never stores a file in git itself, so that no git identity is needed.
LARGEST_IN_GIT = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """An accepted artifact; ``sha256`` and ``blobs`` (git blob sha1) by path, including the manifest's own."""

    folder: Path
    manifest: Manifest
    sha256: Mapping[str, str]
    blobs: Mapping[str, str]
    sizes: Mapping[str, int]

    def is_at(self, path: str, identity: str) -> bool:
        """Whether a file has the identity that a Hub reports: sha256 (LFS) or git blob sha1."""
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
        """A small file's content, after checking its sha256.

        Raises:
            CheckpointError: the file changed since it was verified.
        """
        data = (self.folder / path).read_bytes()
        self.check(path, hashlib.sha256(data).hexdigest())
        return data

    def check(self, path: str, sha256: str) -> None:
        """Raise CheckpointError if a file changed since it was verified."""
        if sha256 != self.sha256[path]:
            raise CheckpointError(f"artifact {self.folder}: {path} changed since it was verified; run its zoo again")


class PublishedFiles(BaseModel):
    """The part of a published manifest, of any version, that identifies its files."""

    fingerprint: str
    files: dict[str, FileEntry]


def published_files(text: bytes) -> PublishedFiles | None:
    """Parse that part of a manifest's text; None if it is invalid."""
    try:
        return PublishedFiles.model_validate_json(text)
    except ValidationError:
        return None


def open_accepted(folder: Path) -> Artifact:
    """Open the artifact in a folder, if its bytes are the verified ones and it was accepted.

    Raises:
        CheckpointError: see ``check_bytes``.
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
    """Check the sha256 of every file against the manifest, and return the manifest.

    Raises:
        CheckpointError: there is no manifest, or a file changed, is extra or is missing.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
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
