"""The table of destination kinds: how each publishes, previews, and reports its current artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from workers.spec.job import Destination, Manifest
from workers.transfer import to_folder, to_hub, tokens
from workers.transfer.artifact import Artifact, open_accepted
from workers.transfer.pace import Pace

Today = Callable[[], date]


@dataclass(frozen=True)
class DestinationRow:
    """One kind of destination.

    ``takes`` recognises its endpoints. ``check`` tells before any work whether this user may write there (to a
    namespace). ``publish`` returns the new current commit or revision; ``preview`` its actions, one per line;
    ``standing`` the manifest and commit of the current artifact, if it has the fingerprint and is complete.
    ``settings`` are the keys of a zoo's ``publish`` that only some kinds support. ``gathers``: artifacts can share a
    repository (``gathered``).
    """

    name: str
    takes: Callable[[str], bool]
    check: Callable[[str, str | None], None]
    publish: Callable[[Destination, str, Artifact, Pace | None, Today], str]
    preview: Callable[[Destination, str, Artifact, date], list[str]]
    standing: Callable[[str, str, str], tuple[Manifest, str] | None]
    settings: frozenset[str] = frozenset()
    gathers: bool = False


HUB = DestinationRow(
    name="Hub",
    takes=to_hub.takes,
    check=tokens.check_token,
    publish=to_hub.publish_to,
    preview=to_hub.preview_of,
    standing=to_hub.standing,
    settings=frozenset({"gated", "collection"}),
    gathers=True,
)
FOLDER = DestinationRow(
    name="folder",
    takes=to_folder.takes,
    check=to_folder.check,
    publish=to_folder.publish,
    preview=to_folder.preview,
    standing=to_folder.standing,
)
DESTINATIONS = (HUB, FOLDER)


def destination_row(endpoint: str) -> DestinationRow:
    """The row of an endpoint's destination; a folder, unless another row recognises it."""
    return next((row for row in DESTINATIONS if row is not FOLDER and row.takes(endpoint)), FOLDER)


def today_utc() -> date:
    """The current day in UTC, which revisions are named by."""
    return datetime.now(UTC).date()


def publish(to: Destination, repo_id: str, folder: Path, pace: Pace | None = None, today: Today = today_utc) -> str:
    """Publish the accepted artifact in a folder; return the new current commit or revision folder.

    Raises:
        CheckpointError, HubRefused, HubUnavailable: see the destinations.
    """
    return destination_row(to.endpoint).publish(to, repo_id, open_accepted(folder), pace, today)


def preview(to: Destination, repo_id: str, folder: Path) -> list[str]:
    """The actions that ``publish`` would take now, one per line; writes nothing."""
    return destination_row(to.endpoint).preview(to, repo_id, open_accepted(folder), today_utc())


def standing(endpoint: str, repo_id: str, fingerprint: str) -> tuple[Manifest, str] | None:
    """Manifest and commit (or folder) of the current artifact, if it has that fingerprint and is complete."""
    return destination_row(endpoint).standing(endpoint, repo_id, fingerprint)


def check(endpoint: str, namespace: str | None = None) -> None:
    """Check that this user may write to the destination, as far as possible before there is an artifact.

    Raises:
        HubRefused: there is no token, it may not write to the namespace, or the folder isn't writable.
        HubUnavailable: no answer.
    """
    destination_row(endpoint).check(endpoint, namespace)


def settings_lacking(endpoint: str, settings: dict[str, object]) -> list[str]:
    """Names of the ``publish`` settings that have a value but aren't supported by this kind of destination."""
    special = frozenset(name for kind in DESTINATIONS for name in kind.settings)
    return [name for name, value in settings.items() if value and name in special - destination_row(endpoint).settings]
