"""What is said of one job on the disk: where its artifacts lie, and the sizes that plan and workers go by."""

from __future__ import annotations

from pathlib import Path

from workers.spec.job import Order

MANIFEST = "quantmill.json"
# Bytes of a weight file, at most.
MAX_SHARD_BYTES = 2_000_000_000
# Tokens that pass a layer at a time, at most: long enough for the matrix products, small enough for the logits.
MICRO_BATCH_TOKENS = 4096


def artifact_folder(workspace: Path | str, order: Order) -> Path:
    """Where an artifact lies once it is whole; its name tells people the recipe, and machines the identity."""
    return Path(workspace) / "artifacts" / f"{order.recipe.name}-{order.fingerprint[:16]}"


def record_path(place: Path) -> Path:
    """Where the quantize stage notes what it made, beside the artifact: verify takes the fallbacks from there."""
    return place.with_name(f"{place.name}.json")


def is_made(place: Path) -> bool:
    """Whether an artifact lies there whole, as the quantize stage has made it."""
    return place.is_dir() and record_path(place).is_file()


def folds_folder(place: Path) -> Path:
    """Where the scales that were folded into an artifact's weights are kept, beside it: verify undoes them."""
    return place.with_name(f"{place.name}.folds")


def layout_path(place: Path) -> Path:
    """Where the engine's decisions (module -> scheme) are kept beside an artifact: verify reads them."""
    return place.with_name(f"{place.name}.layout.json")
