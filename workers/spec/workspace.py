"""Paths of a job's artifacts on disk, and the sizes that both plan and workers use."""

from __future__ import annotations

from pathlib import Path

from workers.spec.checkpoint_files import CHART as CHART
from workers.spec.checkpoint_files import MANIFEST as MANIFEST
from workers.spec.job import Order

# Maximum size of a weight file in bytes.
MAX_SHARD_BYTES = 2_000_000_000
# Maximum tokens of a micro-batch: enough for efficient matrix products, few enough for the logits to fit in memory.
MICRO_BATCH_TOKENS = 4096
# Tokens whose logits are computed and compared at a time: a vocabulary is many times as wide as a model.
LOGITS_ROWS = 512
# Elements of a weight up to which it is decoded on a card, where decoding takes 16 bytes of memory for each.
DECODED_ON_A_CARD = 1 << 28


def artifact_folder(workspace: Path | str, order: Order) -> Path:
    """Final path of an artifact; its name shows the recipe to people, and the identity to machines."""
    return Path(workspace) / "artifacts" / f"{order.recipe.name}-{order.fingerprint[:16]}"


def record_path(folder: Path) -> Path:
    """Path of the quantize stage's record beside an artifact, from which verify reads the fallbacks."""
    return folder.with_name(f"{folder.name}.json")


def is_made(folder: Path) -> bool:
    """Whether the folder is a complete artifact with its record."""
    return folder.is_dir() and record_path(folder).is_file()


def folds_folder(folder: Path) -> Path:
    """Folder of the scales folded into an artifact's weights, beside it; verify uses them."""
    return folder.with_name(f"{folder.name}.folds")


def layout_path(folder: Path) -> Path:
    """Path of the engine's layout (module -> scheme) beside an artifact; verify reads it."""
    return folder.with_name(f"{folder.name}.layout.json")
