"""Publishes into a folder of any fsspec file system; a reader of ``main.json`` sees only complete revisions.

    ROOT/<namespace>/<name>/quantmill-<fingerprint>/    a revision: all files, its manifest written last; never changed
                           /main.json                   the current revision, and those of each day

A revision folder with other bytes isn't touched: the new revision gets the next free name (.2, .3, ...).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import date
from functools import partial

from pydantic import Field, ValidationError

from workers.errors import HubRefused, HubUnavailable, ZooError
from workers.spec.base import Frozen
from workers.spec.job import Destination, Manifest
from workers.spec.workspace import MANIFEST
from workers.transfer.artifact import Artifact, PublishedFiles, published_files
from workers.transfer.filesystems import FileSystem
from workers.transfer.pace import Pace
from workers.transfer.revisions import day_tag, newest, tag_name

MAIN = "main.json"
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Main(Frozen):
    """``main.json``: replaced atomically, and last of all."""

    schema_version: int = 1
    revision: str
    fingerprint: str
    manifest_sha256: str
    days: dict[str, str] = Field(description="The revision of each tag of a day.")


class FolderChange(Frozen):
    """The remaining actions of a publish, in this order."""

    revision: str
    add: tuple[str, ...]
    main: Main | None
    stale: tuple[str, ...]


class FolderStore:
    """The root folder set by ``publish.endpoint``.

    Raises:
        ZooError: the file system is unknown, or its package isn't installed.
    """

    def __init__(self, url: str) -> None:
        self._files = FileSystem(url, "publish.endpoint")

    def check(self) -> None:
        """Check that this user may write to the root, as far as possible without writing.

        Raises:
            HubRefused: the root isn't writable.
        """
        self._files.check()

    def current(self, repo_id: str) -> Main | None:
        """The content of ``main.json``; None if nothing is published there.

        Raises:
            HubRefused: the file isn't quantmill's.
        """
        path = f"{repo_id}/{MAIN}"
        text = self._files.read(path)
        if text is None:
            return None
        try:
            return Main.model_validate_json(text)
        except ValidationError as error:
            raise HubRefused(
                f"publish {repo_id}: {self._files.shown(path)} isn't what quantmill wrote; remove it, or use --force "
                "(publish.force)"
            ) from error

    def manifest(self, repo_id: str, revision: str) -> bytes | None:
        """The manifest of a revision, if the revision is complete."""
        text = self._files.read(f"{repo_id}/{revision}/{MANIFEST}")
        contents = published_files(text) if text is not None else None
        return text if contents is not None and not self._differing(repo_id, revision, contents) else None

    def decide(self, repo_id: str, artifact: Artifact, to: Destination, today: date) -> FolderChange:
        """The remaining actions to publish an artifact.

        Raises:
            ZooError: ``repo_id`` isn't a valid folder name.
            HubRefused: someone else changed the folder, and ``to`` doesn't force.
        """
        if not REPO_ID.fullmatch(repo_id) or ".." in repo_id:
            raise ZooError(f"publish: {repo_id!r} is no name of a folder there; expected namespace/name")
        main = self._checked(repo_id, to.force)
        revision, add = self._revision_folder(repo_id, artifact)
        days = dict(main.days) if main else {}
        if revision not in days.values():
            days[day_tag(days, today)] = revision
        retained = newest(days, revision)[: to.keep]
        wanted = Main(
            revision=revision,
            fingerprint=artifact.manifest.fingerprint,
            manifest_sha256=artifact.sha256[MANIFEST],
            days={name: at for name, at in days.items() if at in retained},
        )
        revisions = (name for name in self._files.names(repo_id) if name.startswith("quantmill-"))
        stale = [name for name in revisions if name not in retained and self.manifest(repo_id, name) is not None]
        return FolderChange(
            revision=revision,
            add=tuple(add),
            main=wanted if wanted != main else None,
            stale=tuple(stale) if to.keep else (),
        )

    def publish(self, repo_id: str, artifact: Artifact, to: Destination, today: date) -> str:
        """Make the artifact the current revision in ``main.json``; return the revision's name.

        Raises:
            CheckpointError: a file changed since it was verified.
            HubRefused: see ``decide``.
            HubUnavailable: the file system failed.
        """
        try:
            change = self.decide(repo_id, artifact, to, today)
            for path in change.add:
                check = partial(artifact.check, path)
                self._files.copy(artifact.folder / path, f"{repo_id}/{change.revision}/{path}", check)
            if change.add:
                self._files.clear(f"{repo_id}/{change.revision}")
            if change.main is not None:
                self._files.replace(f"{repo_id}/{MAIN}", change.main.model_dump_json(indent=1).encode() + b"\n")
            for revision in change.stale:
                self._remove(repo_id, revision)
        except PermissionError as error:
            raise HubRefused(f"publish {repo_id}: {error}; let this user write there") from error
        except (TimeoutError, ConnectionError) as error:
            raise HubUnavailable(f"publish {repo_id}: {type(error).__name__}: {error}") from error
        return change.revision

    def _checked(self, repo_id: str, force: bool) -> Main | None:
        """The current state, after checking that only quantmill changed it."""
        try:
            main = self.current(repo_id)
        except HubRefused:
            if not force:
                raise
            return None
        if force:
            return main
        if main is None:
            foreign = [name for name in self._files.names(repo_id) if not name.startswith(("quantmill-", "."))]
            if foreign:
                raise HubRefused(
                    f"publish {repo_id}: the folder holds what quantmill didn't publish, got {foreign[:5]}; "
                    "choose another publish.name, empty it, or use --force (publish.force)"
                )
            return None
        text = self._files.read(f"{repo_id}/{main.revision}/{MANIFEST}")
        if text is None or hashlib.sha256(text).hexdigest() != main.manifest_sha256:
            differing = [MANIFEST]
        else:
            contents = published_files(text)
            differing = self._differing(repo_id, main.revision, contents) if contents else [MANIFEST]
        if differing:
            raise HubRefused(
                f"publish {repo_id}: somebody else changed {differing[:5]} in {main.revision} since quantmill "
                "published it; keep the changes elsewhere and undo them, or use --force (publish.force)"
            )
        return main

    def _revision_folder(self, repo_id: str, artifact: Artifact) -> tuple[str, list[str]]:
        """The revision's folder, and the files that it lacks, the manifest last."""
        name, number = tag_name(artifact.manifest.fingerprint), 1
        revision = name
        while (missing := self._missing(repo_id, revision, artifact)) is None:
            number += 1
            revision = f"{name}.{number}"
        return revision, missing

    def _missing(self, repo_id: str, revision: str, artifact: Artifact) -> list[str] | None:
        """The artifact's files that a folder lacks; None if it holds anything else."""
        sizes = self._files.sizes(f"{repo_id}/{revision}")
        if not set(sizes) <= set(artifact.sizes) or any(size != artifact.sizes[path] for path, size in sizes.items()):
            return None
        if MANIFEST in sizes:  # written last: comparing sizes and the manifest's bytes is enough
            whole = len(sizes) == len(artifact.sizes)
            return (
                []
                if whole and self._files.sha256(f"{repo_id}/{revision}/{MANIFEST}") == artifact.sha256[MANIFEST]
                else None
            )
        if any(self._files.sha256(f"{repo_id}/{revision}/{path}") != artifact.sha256[path] for path in sizes):
            return None
        return [*sorted(set(artifact.sizes) - set(sizes) - {MANIFEST}), MANIFEST]

    def _differing(self, repo_id: str, revision: str, contents: PublishedFiles) -> list[str]:
        """Files whose presence or size differs from the manifest."""
        sizes = self._files.sizes(f"{repo_id}/{revision}")
        sizes.pop(MANIFEST, None)
        wanted = {path: entry.size for path, entry in contents.files.items()}
        return sorted(path for path in {*sizes, *wanted} if sizes.get(path) != wanted.get(path))

    def _remove(self, repo_id: str, revision: str) -> None:
        """Delete a revision, unless someone else added or changed files in it."""
        if self.manifest(repo_id, revision) is not None:
            self._files.remove(f"{repo_id}/{revision}", first=MANIFEST)


# ----------------------------------------------------------------------------------- as a destination


def takes(endpoint: str) -> bool:
    """Whether an endpoint is a folder: a path, or a URL of fsspec's."""
    return not endpoint.startswith(("http://", "https://"))


def check(endpoint: str, namespace: str | None) -> None:
    """Check that this user may write to the folder.

    Raises:
        HubRefused: the folder isn't writable.
    """
    FolderStore(endpoint).check()


def publish(to: Destination, repo_id: str, artifact: Artifact, pace: Pace | None, today: Callable[[], date]) -> str:
    """Make the artifact current in ``main.json``; return its revision. Raises as ``FolderStore.publish``."""
    return FolderStore(to.endpoint).publish(repo_id, artifact, to, today())


def preview(to: Destination, repo_id: str, artifact: Artifact, today: date) -> list[str]:
    """The actions that ``publish`` would take now, one per line."""
    change = FolderStore(to.endpoint).decide(repo_id, artifact, to, today)
    new_days = change.main.days if change.main else {}
    return [
        *(f"upload {change.revision}/{path} ({artifact.sizes[path]:,} bytes)" for path in change.add),
        *([f"point main.json to {change.revision}"] if change.main else []),
        *(f"tag {day}" for day, revision in new_days.items() if revision == change.revision),
        *(f"delete {revision}" for revision in change.stale),
    ]


def standing(endpoint: str, repo_id: str, fingerprint: str) -> tuple[Manifest, str] | None:
    """Manifest and revision of the current artifact, if it has that fingerprint and is complete."""
    store = FolderStore(endpoint)
    try:
        main = store.current(repo_id)
        text = store.manifest(repo_id, main.revision) if main and main.fingerprint == fingerprint else None
        return (Manifest.model_validate_json(text), main.revision) if main and text is not None else None
    except (HubRefused, ValidationError):
        return None  # someone else's, or another version's: ``publish`` reports the error
