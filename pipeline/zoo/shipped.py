"""Look up what quantmill ships beside its code: recipes and gates in ``configs/``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.zoo.problems import explain
from workers.errors import ZooError
from workers.spec.base import meant
from workers.spec.job import Thresholds
from workers.spec.recipes import Recipe

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def configs() -> Path:
    """The folder ``configs``: inside the package in a wheel, at the top of the project in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def own_text() -> tuple[Path, Path]:
    """The project's own text, to calibrate on and to compare on; its rights are in the README beside it."""
    inside = configs() / "text"
    folder = inside if inside.is_dir() else configs().parent / "tests" / "zoo" / "text"
    return folder / "calibration.txt", folder / "heldout.txt"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in (configs() / "recipes").glob("*.yaml"))


@cache
def recipe(name: str) -> Recipe:
    """The shipped recipe of that name.

    Raises:
        ZooError: no shipped recipe has that name.
    """
    if name not in recipe_names():
        known = recipe_names()
        raise ZooError(
            f"recipes: unknown recipe, got {name!r}; {meant(name, known)}quantmill ships {', '.join(known)}. "
            "Name one of them, or define the recipe in place (name, method, scheme, format)."
        )
    path = configs() / "recipes" / f"{name}.yaml"
    content = {"name": name, **yaml.safe_load(path.read_text())}
    try:
        return _RECIPE.validate_python(content)
    except ValidationError as error:
        raise ZooError(explain(error, str(path), content)) from error


@cache
def gates() -> dict[str, dict[str, Thresholds]]:
    """The shipped gates: name of a set -> family of recipes -> thresholds (``configs/gates.yaml``)."""
    raw: dict[str, dict[str, Any]] = yaml.safe_load((configs() / "gates.yaml").read_text())
    return {
        name: {family: Thresholds.model_validate(values) for family, values in families.items()}
        for name, families in raw.items()
    }
