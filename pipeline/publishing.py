"""``quantmill publish``: one artifact, checked, to one place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from workers.errors import ZooError
from workers.spec.job import Destination
from workers.transfer import destinations, hub
from workers.transfer.artifact import open_accepted
from workers.transfer.pace import LocalPace
from workers.transfer.patience import insist


def place(endpoint: str | None) -> str:
    """The address of ``--endpoint``; a relative folder is one from here."""
    if endpoint is None or "://" in endpoint:
        return hub.normalized(endpoint)
    return str(Path(endpoint).resolve())


def publish(artifact: Path, repo_id: str, to: Destination, *, dry_run: bool) -> Iterator[str]:
    """Publish, or say what would be done; yields the lines to show.

    Raises:
        ZooError: no name of a repository.
        CheckpointError, HubRefused, HubUnavailable: as the destinations say.
    """
    namespace, _, name = repo_id.partition("/")
    if not namespace or not name or "/" in name:
        raise ZooError(f"--to: expected NAMESPACE/NAME, got {repo_id!r}")
    if destinations.settings_lacking(to.endpoint, {"gated": to.gated}):
        kind = destinations.destination_row(to.endpoint).name
        raise ZooError(f"--gated: a {kind} has no gate, got --endpoint {to.endpoint!r}; leave it out")
    open_accepted(artifact)  # before anything is asked of a Hub
    insist(lambda: destinations.check(to.endpoint, namespace))
    if dry_run:
        lines = destinations.preview(to, repo_id, artifact)
        yield f"{to.endpoint}/{repo_id}: " + ("would change:" if lines else "shows this artifact already")
        yield from (f"  {line}" for line in lines)
        return
    revision = destinations.publish(to, repo_id, artifact, LocalPace(to.limits))
    yield f"{to.endpoint}/{repo_id} at {revision}"
