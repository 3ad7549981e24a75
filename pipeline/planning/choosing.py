"""Choose recipes for a model: its size from its headers, and what earlier runs measured of it, for the rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.planning import fitting, sizing, sources
from pipeline.planning.recommend import Recommendation, Use, recommend
from pipeline.planning.sources import PinnedModel
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from workers.errors import CheckpointError, ZooError
from workers.spec.base import Frozen
from workers.spec.bounds import MANIFEST_BYTES, parse_json
from workers.spec.cards import Card, card_named, lacks
from workers.spec.recipes import KeepRecipe
from workers.spec.runtimes import runtime_named

SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Measured(Frozen):
    """What a run measured of a recipe's artifact of a model; KL in nats for each token."""

    kl_mean: float
    top1_agreement: float
    bytes: int
    run: str


def memory_bytes(size: str, where: str = "--memory") -> int:
    """Bytes of a size in words, as 16GiB, 24GB or 512M; ``where`` begins the message of what isn't one.

    Raises:
        ZooError: it isn't one.
    """
    match = SIZE.match(size)
    found = round(float(match.group(1)) * UNITS[(match.group(2) or "").lower()]) if match else 0
    if found < 2**20:
        raise ZooError(f"{where}: got {size!r}, expected a size of at least 1 MiB; write it as 16GiB or 24GB")
    return found


def card(name: str, where: str = "--gpu") -> Card:
    """The card of a name; ``where`` begins the message where it isn't known.

    Raises:
        ZooError: it isn't known.
    """
    try:
        return card_named(name)
    except ValueError as error:
        raise ZooError(f"{where}: {error}") from None


def source(model: str, here: Path) -> PinnedModel:
    """A model, pinned, with the headers of its weight files; a folder is relative to ``here``.

    Raises:
        UserError, HubUnavailable: it can't be resolved (``sources.resolve``), or has no headers.
    """
    found = sources.resolve(ModelEntry(id=model), here)
    if not found.tensors:
        raise CheckpointError(
            f"{model}: its weights are pickled, and have no headers to count parameters by; save it as safetensors"
        )
    return found


def choose(
    source: PinnedModel,
    memory: int | None,
    runtime: str | None,
    use: Use,
    measured: Mapping[str, Measured],
    card: Card | None = None,
) -> list[Recommendation]:
    """The shipped recipes that the model can be made by, best first; those that don't fit the memory come last.

    ``card``: those alone whose arithmetic it has.

    Raises:
        ZooError: the runtime is unknown, or no shipped recipe serves the use in it.
    """
    count = sum(tensor.numel for tensor in source.tensors)
    try:
        named = (runtime_named(runtime).name,) if runtime else ()
        shipped_recipes = [shipped.recipe(name) for name in shipped.recipe_names()]
        recipes = [recipe for recipe in shipped_recipes if not isinstance(recipe, KeepRecipe)]
        able = [recipe for recipe in recipes if not any(fitting.recipe_problems(source, recipe, named))]
        able = [recipe for recipe in able if card is None or lacks(card, recipe) is None]
        sizes = {recipe.name: sizing.artifact_bytes(source, recipe) for recipe in able}
        found = recommend(count, memory, runtime, use, able, measured, sizes)
    except ValueError as error:
        raise ZooError(f"--runtime: {error}") from None
    if not found:
        raise ZooError(
            f"--use: no shipped recipe serves {use!r} for {source.name} in {runtime or 'any runtime'}; leave --runtime "
            "out, or choose another --use"
        )
    return found


def measured_of(model: str, folders: Sequence[Path]) -> dict[str, Measured]:
    """What runs measured of a model, by recipe, from the ``results.json`` in or below the folders; the newest run's.

    A model is known by its name: the last part of its id.
    """
    found: dict[str, Measured] = {}
    paths = {
        path for folder in folders for pattern in ("results.json", "*/results.json") for path in folder.glob(pattern)
    }
    for path in sorted(paths, key=lambda each: each.parent.name):
        found |= _measured_in(path, Path(model).name)
    return found


def _measured_in(path: Path, name: str) -> dict[str, Measured]:
    try:
        content = parse_json(path.read_bytes(), str(path), MANIFEST_BYTES)
        entries = [entry for entry in content["artifacts"] if entry["metrics"] and Path(entry["model"]).name == name]
        return {
            entry["recipe"]: Measured(
                kl_mean=entry["metrics"]["kl_mean"],
                top1_agreement=entry["metrics"]["top1_agreement"],
                bytes=entry["bytes"],
                run=content["run_id"],
            )
            for entry in entries
        }
    except (OSError, KeyError, TypeError, CheckpointError, ValidationError):
        return {}  # another tool's file of that name
