"""Find what this machine lacks for recipes, each checked in the environment that its stages run in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import registry
from pipeline.planning.automatic import load
from pipeline.zoo import shipped
from pipeline.zoo import zoo as zoos
from workers.errors import PreflightError, QuantmillError, ZooError
from workers.machine import child, environments, preflight
from workers.machine.preflight import MachineFacts
from workers.spec.base import meant
from workers.spec.recipes import Recipe
from workers.transfer import destinations, hub, reach


def recipes(names: Sequence[str], zoo: Path | None) -> list[Recipe]:
    """The shipped recipes of these names (all if empty), or those of a zoo file.

    Raises:
        ZooError: a name is unknown or not in the zoo, or the zoo is invalid.
    """
    if zoo is None:
        return [shipped.recipe(name) for name in names or shipped.recipe_names()]
    by_name = {recipe.name: recipe for recipe in load(zoo).resolved_recipes}
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
    return () if zoo is None else load(zoo).verify.runtimes or ()


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
    asked = registry.ask(chosen)
    refused = {**asked.here, **asked.never}
    known = {
        name: facts if isinstance(facts, str) else facts.model_copy(update={"refused": refused})
        for name, facts in facts_by_environment.items()
    }
    return {recipe.name: problems_of(known, recipe, runtimes) for recipe in chosen}


def zoo_problems(zoo: Path, out: Path) -> list[str]:
    """What a zoo's run would lack of its destination (reach, token, permission) and of its output folder.

    Raises:
        ZooError: the zoo is invalid.
    """
    publish, found = load(zoo).publish, list[str]()
    if publish is not None and publish.endpoint != zoos.LOOPBACK:
        try:
            endpoint = hub.normalized(publish.endpoint)
            if endpoint.startswith(("http://", "https://")):
                reach.check(endpoint, "publish.endpoint")
            destinations.check(endpoint, publish.namespace)
        except QuantmillError as error:
            found.append(str(error))
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        found.append(f"--out: {str(existing)!r} can't be written by this user; name another folder, or chmod it")
    return found


def problems_of(
    facts_by_environment: Mapping[str | None, MachineFacts | str], recipe: Recipe, runtimes: Sequence[str]
) -> list[str]:
    """What a machine lacks for a recipe, by the facts of its environments, or why one is unusable there."""
    facts = facts_by_environment[recipe.environment]
    unusable = [facts_by_environment[name] for name in preflight.environments_of(recipe, runtimes)]
    problems = [problem for problem in unusable if isinstance(problem, str)]
    return problems if isinstance(facts, str) else [*problems, *preflight.problems(facts, recipe, runtimes)]
