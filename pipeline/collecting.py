"""One collection for each zoo, in which all of its artifacts that stand published are."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.planning.plan import Collection
from workers.errors import QuantmillError
from workers.transfer import hub
from workers.transfer.patience import Patience

COLLECTION_SECONDS = 600.0


def collect(collection: Collection, repo_ids: Iterable[str]) -> str | None:
    """Put repositories into a collection, which is made if need be; what went wrong, in words, if something did.

    The artifacts are published by then: nothing here may make a run fail.
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
            # By its title first: on the public Hub, two collections may have the same one.
            found = api.list_collections(owner=collection.namespace)
            slugs = [entry.slug for entry in found if entry.title == collection.title]
            if slugs:
                return str(min(slugs))
            title, namespace, private = collection.title, collection.namespace, collection.private
            return str(api.create_collection(title, namespace=namespace, private=private, exists_ok=True).slug)

    slug = patience.call(f"make {thing}", make)

    def there() -> set[str]:
        with hub.hub_errors(thing):
            return {str(item.item_id) for item in api.get_collection(slug).items}

    def add(repo_id: str) -> None:
        with hub.hub_errors(f"put {repo_id} into {thing}"):
            api.add_collection_item(slug, item_id=repo_id, item_type="model", exists_ok=True)

    for repo_id in sorted(set(repo_ids) - patience.call(f"read {thing}", there)):
        patience.call(f"put {repo_id} into {thing}", lambda repo_id=repo_id: add(repo_id))  # type: ignore[misc]
