"""One door to where artifacts go: a Hub, or a folder. What stands there, what would change, and publishing itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import ValidationError

from workers import hub, publishing
from workers.artifact import open_accepted
from workers.errors import HubRefused
from workers.folders import FolderStore, is_folder
from workers.job import Destination, Manifest
from workers.pace import Pace
from workers.revisions import tag_name


def today_utc() -> date:
    """The day that revisions are named for, the same all over the world."""
    return datetime.now(UTC).date()


def publish(
    to: Destination, repo_id: str, folder: Path, pace: Pace | None = None, today: Callable[[], date] = today_utc
) -> str:
    """Publish the accepted artifact in a folder; return the commit, or the revision's folder, that then is current.

    Raises:
        CheckpointError, HubRefused, HubUnavailable: as the destinations say.
    """
    artifact = open_accepted(folder)
    if is_folder(to.endpoint):
        return FolderStore(to.endpoint).publish(repo_id, artifact, to, today())
    api = hub.connect(to.endpoint, pace)
    return publishing.publish(api, repo_id, artifact, to, today=today)


def preview(to: Destination, repo_id: str, folder: Path) -> list[str]:
    """What ``publish`` would do now, in words, one action a line; writes nothing."""
    artifact, today = open_accepted(folder), today_utc()
    if is_folder(to.endpoint):
        change = FolderStore(to.endpoint).decide(repo_id, artifact, to, today)
        new_days = change.main.days if change.main else {}
        return [
            *(f"upload {change.revision}/{path} ({artifact.sizes[path]:,} bytes)" for path in change.add),
            *([f"point main.json to {change.revision}"] if change.main else []),
            *(f"tag {day}" for day, revision in new_days.items() if revision == change.revision),
            *(f"delete {revision}" for revision in change.stale),
        ]
    todo = publishing.preview(hub.connect(to.endpoint), repo_id, artifact, to, today)
    return [
        *([f"create {repo_id} ({'private' if to.private else 'public'})"] if todo.create else []),
        *([f"set gated to {to.gated}"] if todo.gate else []),
        *(f"upload {path} ({artifact.sizes[path]:,} bytes)" for path in todo.add),
        *(f"delete {path}" for path in todo.delete),
        *(["commit once"] if todo.commits else []),
        *(f"tag {tag}" for tag in todo.tags),
        *(f"delete tag {tag}" for tag in todo.stale_tags),
    ]


def standing(endpoint: str, repo_id: str, fingerprint: str) -> tuple[Manifest, str] | None:
    """The artifact of that fingerprint as it stands, if it's whole: its manifest and commit (or folder).

    On a Hub it's whole with the tag that comes after the commit; what somebody changed on ``main`` later isn't in it.
    """
    if is_folder(endpoint):
        store = FolderStore(endpoint)
        try:
            main = store.current(repo_id)
            text = store.manifest(repo_id, main.revision) if main and main.fingerprint == fingerprint else None
            return (Manifest.model_validate_json(text), main.revision) if main and text is not None else None
        except (HubRefused, ValidationError):
            return None  # somebody else's, or another version's: the publish itself says so
    api = hub.connect(endpoint)
    there = hub.read_manifest(api, repo_id)
    if there is None or there[0].fingerprint != fingerprint:
        return None
    tagged = hub.read_manifest(api, repo_id, tag_name(fingerprint))
    return tagged if tagged and tagged[0].fingerprint == fingerprint else None
