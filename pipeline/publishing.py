"""Implement ``quantmill publish``: check one artifact and publish it to one destination."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from workers.errors import ZooError
from workers.spec.job import Destination
from workers.transfer import destinations, hub
from workers.transfer.artifact import open_accepted
from workers.transfer.pace import LocalPace
from workers.transfer.patience import insist


def resolve_endpoint(endpoint: str | None) -> str:
    """The address that ``--endpoint`` means; a relative folder is resolved from the current directory."""
    if endpoint is None or "://" in endpoint:
        return hub.normalized(endpoint)
    return str(Path(endpoint).resolve())


def publish(artifact: Path, repo_id: str, destination: Destination, *, dry_run: bool) -> Iterator[str]:
    """Publish, or with ``dry_run`` only describe the changes; yields the lines to print.

    Raises:
        ZooError: ``repo_id`` is no name of a repository, or the destination lacks a setting.
        CheckpointError, HubRefused, HubUnavailable: from the artifact's check and the destination.
    """
    namespace, _, name = repo_id.partition("/")
    if not namespace or not name or "/" in name:
        raise ZooError(f"--to: expected NAMESPACE/NAME, got {repo_id!r}")
    if destinations.settings_lacking(destination.endpoint, {"gated": destination.gated}):
        kind = destinations.destination_row(destination.endpoint).name
        raise ZooError(f"--gated: a {kind} has no gate, got --endpoint {destination.endpoint!r}; leave it out")
    open_accepted(artifact)  # before any request to a Hub
    insist("check the destination", lambda: destinations.check(destination.endpoint, namespace))
    if dry_run:
        lines = destinations.preview(destination, repo_id, artifact)
        yield f"{destination.endpoint}/{repo_id}: " + ("would change:" if lines else "shows this artifact already")
        yield from (f"  {line}" for line in lines)
        return
    revision = destinations.publish(destination, repo_id, artifact, LocalPace(destination.limits))
    yield f"{destination.endpoint}/{repo_id} at {revision}"
