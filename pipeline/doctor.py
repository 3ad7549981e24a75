"""What this machine lacks for recipes, each judged by the packages of the environment that its stages run in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.zoo import shipped
from pipeline.zoo import zoo as zoos
from workers.errors import PreflightError, ZooError
from workers.machine import child, environments, preflight
from workers.machine.preflight import MachineFacts
from workers.spec.recipes import Recipe


def recipes(names: Sequence[str], zoo: Path | None) -> list[Recipe]:
    """The shipped recipes of these names, all if there are none; or those of a zoo file.

    Raises:
        ZooError: an unknown name, a wrong zoo, or a name that the zoo doesn't have.
    """
    if zoo is None:
        return [shipped.recipe(name) for name in names or shipped.recipe_names()]
    having = {recipe.name: recipe for recipe in zoos.load(zoo).resolved_recipes}
    if unknown := sorted(set(names) - set(having)):
        raise ZooError(f"{zoo}: has no recipe {unknown[0]!r}; it has {', '.join(having)}")
    return [having[name] for name in names or having]


def facts(python: str | Path, out: Path) -> MachineFacts:
    """What a Python of this machine has, as a process of its own finds: looking at the devices takes torch.

    Raises:
        PreflightError: it doesn't start, or doesn't load quantmill.
    """
    try:
        done = child.run(
            "workers.machine.preflight:answer", json.dumps({"workspace": str(out.absolute())}), python=python
        )
    except OSError as error:
        raise PreflightError(f"{python} doesn't start ({error})") from error
    if done.answer is None:
        raise PreflightError(f"{python} can't run quantmill ({done.said})")
    return MachineFacts.model_validate_json(done.answer)


def examine(chosen: Sequence[Recipe], here: MachineFacts, out: Path) -> dict[str, list[str]]:
    """All that is missing, by recipe; ``here`` are the facts of this process's own Python."""
    found: dict[str | None, MachineFacts | str] = {None: here}
    for name in {recipe.environment for recipe in chosen} - {None}:
        assert name is not None
        try:
            found[name] = facts(environments.interpreter(name), out)
        except PreflightError as error:
            found[name] = str(error)
    return {recipe.name: _problems(found[recipe.environment], recipe) for recipe in chosen}


def _problems(found: MachineFacts | str, recipe: Recipe) -> list[str]:
    return [found] if isinstance(found, str) else preflight.problems(found, recipe)
