"""Keep one Hub collection for each zoo, with all of its published artifacts."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.planning.plan import Collection
from workers.errors import QuantmillError
from workers.transfer import hub
from workers.transfer.patience import Patience

COLLECTION_SECONDS = 600.0  # deadline for all requests together, retries included


def collect(collection: Collection, repo_ids: Iterable[str]) -> str | None:
    """Add repositories to a collection, created if needed; returns a message if that failed, else None.

    The artifacts are published already, so a failure here must not fail the run.
    """
    try:
        _collect(collection, repo_ids, Patience(COLLECTION_SECONDS))
    except QuantmillError as error:
        return f"collection {collection.title!r}: {error}"
    return None


def _collect(collection: Collection, repo_ids: Iterable[str], patience: Patience) -> None:
    api = hub.connect(collection.endpoint)
    thing = f"collection {collection.title!r} of {collection.namespace}"

    def make() -> str:
        with hub.hub_errors(thing):
            # Look it up by title first: the public Hub would create a second collection with the same title.
            collections = api.list_collections(owner=collection.namespace)
            slugs = [entry.slug for entry in collections if entry.title == collection.title]
            if slugs:
                return str(min(slugs))
            title, namespace, private = collection.title, collection.namespace, collection.private
            return str(api.create_collection(title, namespace=namespace, private=private, exists_ok=True).slug)

    slug = patience.call(f"make {thing}", make)

    def listed_repos() -> set[str]:
        with hub.hub_errors(thing):
            return {str(item.item_id) for item in api.get_collection(slug).items}

    def add(repo_id: str) -> None:
        with hub.hub_errors(f"put {repo_id} into {thing}"):
            api.add_collection_item(slug, item_id=repo_id, item_type="model", exists_ok=True)

    for repo_id in sorted(set(repo_ids) - patience.call(f"read {thing}", listed_repos)):
        patience.call(f"put {repo_id} into {thing}", lambda repo_id=repo_id: add(repo_id))  # type: ignore[misc]
