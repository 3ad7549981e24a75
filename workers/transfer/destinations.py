"""The destinations of artifacts, one row for each kind: what stands there, what would change, publishing itself."""

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

    ``takes`` recognises its endpoints. ``check`` says before anything is made whether this user may write there (to a
    namespace). ``publish`` returns the commit, or revision, that then is current; ``preview`` what it would do, one
    action a line; ``standing`` the manifest and commit of the artifact that stands, if it has a fingerprint and is
    whole. ``settings`` are those of ``publish`` in a zoo that only some kinds have.
    """

    name: str
    takes: Callable[[str], bool]
    check: Callable[[str, str | None], None]
    publish: Callable[[Destination, str, Artifact, Pace | None, Today], str]
    preview: Callable[[Destination, str, Artifact, date], list[str]]
    standing: Callable[[str, str, str], tuple[Manifest, str] | None]
    settings: frozenset[str] = frozenset()


HUB = DestinationRow(
    name="Hub",
    takes=to_hub.takes,
    check=tokens.check_token,
    publish=to_hub.publish_to,
    preview=to_hub.preview_of,
    standing=to_hub.standing,
    settings=frozenset({"gated", "collection"}),
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
    """The kind of destination that an endpoint is."""
    return next(kind for kind in DESTINATIONS if kind.takes(endpoint))


def today_utc() -> date:
    """The day that revisions are named for, the same all over the world."""
    return datetime.now(UTC).date()


def publish(to: Destination, repo_id: str, folder: Path, pace: Pace | None = None, today: Today = today_utc) -> str:
    """Publish the accepted artifact in a folder; return the commit, or the revision's folder, that then is current.

    Raises:
        CheckpointError, HubRefused, HubUnavailable: as the destinations say.
    """
    return destination_row(to.endpoint).publish(to, repo_id, open_accepted(folder), pace, today)


def preview(to: Destination, repo_id: str, folder: Path) -> list[str]:
    """What ``publish`` would do now, in words, one action a line; writes nothing."""
    return destination_row(to.endpoint).preview(to, repo_id, open_accepted(folder), today_utc())


def standing(endpoint: str, repo_id: str, fingerprint: str) -> tuple[Manifest, str] | None:
    """The artifact of that fingerprint as it stands, if it's whole: its manifest and commit (or folder)."""
    return destination_row(endpoint).standing(endpoint, repo_id, fingerprint)


def check(endpoint: str, namespace: str | None = None) -> None:
    """Whether artifacts may be written there, as far as it can be told before there are any.

    Raises:
        HubRefused: no token, or one that may not write to the namespace; a folder of somebody else's.
        HubUnavailable: no answer.
    """
    destination_row(endpoint).check(endpoint, namespace)


def settings_lacking(endpoint: str, settings: dict[str, object]) -> list[str]:
    """Which of these settings of a zoo's ``publish`` have a value that a destination of this kind has no use for."""
    special = frozenset(name for kind in DESTINATIONS for name in kind.settings)
    return [name for name, value in settings.items() if value and name in special - destination_row(endpoint).settings]
