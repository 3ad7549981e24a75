"""Asks engines that have a library's registry why recipes can't be made, each in a process of its own."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from workers.errors import PreflightError
from workers.machine import child, environments
from workers.spec.engines import ENGINES, RegistryAnswer, RegistryRequest
from workers.spec.recipes import Recipe


def ask(recipes: Iterable[Recipe], *, tried: bool = True) -> RegistryAnswer:
    """Why recipes can't be made; nothing about those whose engine has no registry, which starts no process.

    ``tried`` also has each quantize a tiny model. Recipes with an environment are asked about there.
    """
    groups: dict[tuple[str, str | None], list[Recipe]] = defaultdict(list)
    for recipe in recipes:
        if entry := ENGINES[recipe.engine].asks:
            groups[entry, recipe.environment].append(recipe)
    answers = [_in(entry, environment, group, tried) for (entry, environment), group in groups.items()]
    return _joined(answers)


def _in(entry: str, environment: str | None, recipes: Sequence[Recipe], tried: bool) -> RegistryAnswer:
    try:
        python = environments.interpreter(environment) if environment else Path(sys.executable)
    except PreflightError as error:
        return RegistryAnswer(here={recipe.name: str(error) for recipe in recipes})
    request = RegistryRequest(recipes=tuple(recipes), tried=tried)
    ended = _run(entry, request.model_dump_json(), python)
    if ended.answer is not None:
        return RegistryAnswer.model_validate_json(ended.answer)
    if len(recipes) > 1:  # one of them ended the process
        return _joined(_in(entry, environment, [recipe], tried) for recipe in recipes)
    died = f"recipe {recipes[0].name!r}: its library ended the process ({ended.said}); choose another recipe"
    return RegistryAnswer(here={recipes[0].name: died})


@lru_cache
def _run(entry: str, request: str, python: Path) -> child.Ended:
    """The answer to a request; a plan and its feasibility ask the same."""
    return child.run(entry, request, python=python)


def _joined(answers: Iterable[RegistryAnswer]) -> RegistryAnswer:
    never: dict[str, str] = {}
    here: dict[str, str] = {}
    for answer in answers:
        never |= answer.never
        here |= answer.here
    return RegistryAnswer(never=never, here=here)
