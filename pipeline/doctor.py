"""Find what this machine lacks for recipes, each checked in the environment that its stages run in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.zoo import shipped
from pipeline.zoo import zoo as zoos
from workers.errors import PreflightError, ZooError
from workers.machine import child, environments, preflight
from workers.machine.preflight import MachineFacts
from workers.spec.base import meant
from workers.spec.recipes import Recipe


def recipes(names: Sequence[str], zoo: Path | None) -> list[Recipe]:
    """The shipped recipes of these names (all if empty), or those of a zoo file.

    Raises:
        ZooError: a name is unknown or not in the zoo, or the zoo is invalid.
    """
    if zoo is None:
        return [shipped.recipe(name) for name in names or shipped.recipe_names()]
    by_name = {recipe.name: recipe for recipe in zoos.load(zoo).resolved_recipes}
    if unknown := sorted(set(names) - set(by_name)):
        raise ZooError(
            f"{zoo}: has no recipe {unknown[0]!r}; {meant(unknown[0], by_name)}it has {', '.join(by_name)}; name one"
        )
    return [by_name[name] for name in names or by_name]


def facts(python: str | Path, out: Path) -> MachineFacts:
    """Facts about this machine and a Python's packages, from a separate process, as probing GPUs loads torch.

    Raises:
        PreflightError: the Python doesn't start, or can't load quantmill.
    """
    try:
        ended = child.run(
            "workers.machine.preflight:answer", json.dumps({"workspace": str(out.absolute())}), python=python
        )
    except OSError as error:
        raise PreflightError(f"{python} doesn't start ({error})") from error
    if ended.answer is None:
        raise PreflightError(f"{python} can't run quantmill ({ended.said})")
    return MachineFacts.model_validate_json(ended.answer)


def runtimes(zoo: Path | None) -> tuple[str, ...]:
    """The runtimes that a zoo file names for its checks; none without one."""
    return () if zoo is None else zoos.load(zoo).verify.runtimes or ()


def examine(
    chosen: Sequence[Recipe], driver_facts: MachineFacts, out: Path, runtimes: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Everything missing, by recipe; ``driver_facts`` are the facts of this process's own Python."""
    facts_by_environment: dict[str | None, MachineFacts | str] = {None: driver_facts}
    for name in {name for recipe in chosen for name in preflight.environments_of(recipe, runtimes)}:
        try:
            facts_by_environment[name] = facts(environments.interpreter(name), out)
        except PreflightError as error:
            facts_by_environment[name] = str(error)
    return {recipe.name: _problems(facts_by_environment, recipe, runtimes) for recipe in chosen}


def _problems(
    facts_by_environment: Mapping[str | None, MachineFacts | str], recipe: Recipe, runtimes: Sequence[str]
) -> list[str]:
    facts = facts_by_environment[recipe.environment]
    unusable = [facts_by_environment[name] for name in preflight.environments_of(recipe, runtimes)]
    problems = [problem for problem in unusable if isinstance(problem, str)]
    return problems if isinstance(facts, str) else [*problems, *preflight.problems(facts, recipe, runtimes)]
