"""Read a zoo file whose recipes are chosen for each model by a budget (``recipes: auto``), or any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.planning import choosing
from pipeline.zoo.problems import explain
from pipeline.zoo.zoo import AUTO, Budget, ModelEntry, Zoo, check, load_plugins, read_yaml
from workers.errors import ZooError


def load(path: Path, out: Path | None = None) -> Zoo:
    """Read a zoo file; recipes that a budget chooses are filled in, from what runs in ``out`` measured where they did.

    Raises:
        ZooError: the message names key, value and remedy of every finding, or a model that nothing fits.
        UserError, HubUnavailable: a model can't be resolved, so that nothing can be chosen for it.
    """
    raw = read_yaml(path)
    load_plugins(raw, path)
    return check(filled_in(raw, path, out), str(path))


def filled_in(raw: object, path: Path, out: Path | None = None) -> object:
    """A parsed zoo file with the recipes that its budget chooses, the same for those that name their recipes.

    Raises: as ``load``.
    """
    if not isinstance(raw, dict) or raw.get("recipes") != AUTO:
        return raw
    try:
        budget = Budget.model_validate(raw.get("budget") or {})
        entries = [ModelEntry.model_validate(entry) for entry in raw.get("models") or ()]
    except ValidationError as error:
        raise ZooError(explain(error, str(path), raw, Zoo)) from error
    card = choosing.card(budget.gpu, f"{path}: budget.gpu") if budget.gpu else None
    room = (
        choosing.memory_bytes(budget.memory, f"{path}: budget.memory")
        if budget.memory
        else card.memory
        if card
        else None
    )
    models: list[dict[str, Any]] = []
    for written, entry in zip(raw["models"], entries, strict=True):
        source = choosing.source(entry.id, path.resolve().parent)
        known = choosing.measured_of(entry.id, [out] if out else [])
        found = [one for one in choosing.choose(source, room, budget.runtime, budget.use, known, card) if one.fits]
        if not found:
            raise ZooError(
                f"{path}: budget: no recipe of {entry.id!r} fits {budget.memory or budget.gpu}; raise it, or leave the "
                "model out"
            )
        models.append({**written, "recipes": [one.recipe for one in found[: budget.best]]})
    chosen = dict.fromkeys(name for model in models for name in model["recipes"])
    return {**raw, "models": models, "recipes": list(chosen)}
