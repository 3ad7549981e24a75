"""Look up what quantmill ships beside its code: recipes and gates in ``configs/``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.zoo.problems import explain
from workers.errors import ZooError
from workers.spec import plugins
from workers.spec.base import Frozen, meant
from workers.spec.data import Dataset, Sequences
from workers.spec.job import Thresholds
from workers.spec.recipes import Recipe


class CalibrationSet(Frozen):
    """A named set of calibration data (configs/calibration): what a zoo's calibration says, less what isn't said."""

    description: str
    mixture: tuple[Dataset, ...] = Field(min_length=1)
    sequences: Sequences = "documents"


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def configs() -> Path:
    """The folder ``configs``: inside the package in a wheel, at the top of the project in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def own_text() -> tuple[tuple[Path, ...], Path]:
    """The project's own text, to calibrate on (prose and code) and to compare on (prose, which cards may show).

    Its rights are in the README beside it.
    """
    inside = configs() / "text"
    folder = inside if inside.is_dir() else configs().parent / "tests" / "zoo" / "text"
    return (folder / "prose-calibration.txt", folder / "calibration.txt"), folder / "prose-heldout.txt"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, and of those that plugins add, sorted."""
    return sorted(_recipe_files())


def _recipe_files() -> dict[str, Path]:
    folders = [*plugins.RECIPES, configs() / "recipes"]  # a shipped name stays what it is
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


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
    path = _recipe_files()[name]
    content = {"name": name, **yaml.safe_load(path.read_text())}
    try:
        return _RECIPE.validate_python(content)
    except ValidationError as error:
        raise ZooError(explain(error, str(path), content)) from error


# The calibration of a zoo that names none, though its recipes need one.
DEFAULT_SET = "general"


def calibration_sets() -> list[str]:
    """Names of the shipped sets of calibration data, sorted."""
    return sorted(path.stem for path in (configs() / "calibration").glob("*.yaml"))


@cache
def calibration_set(name: str) -> CalibrationSet:
    """The shipped set of calibration data of that name.

    Raises:
        ValueError: no shipped set has that name.
    """
    known = calibration_sets()
    if name not in known:
        raise ValueError(
            f"unknown set, got {name!r}; {meant(name, known)}quantmill ships {', '.join(known)}; name one of them, or "
            "list data sets as mixture: [{path: ...}]"
        )
    return CalibrationSet.model_validate(yaml.safe_load((configs() / "calibration" / f"{name}.yaml").read_text()))


def filled_in(given: object) -> object:
    """A zoo's calibration as it's written, with what the set that it names says, where the zoo doesn't.

    Raises:
        ValueError: no such set; or a set and other data are named.
    """
    given = {"set": given} if isinstance(given, str) else given
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"expected the name of a set or a mapping, got {given!r:.80}; write it as "
            f"{{dataset: ...}}, or as {DEFAULT_SET}"
        )
    if given is None or not isinstance(given.get("set"), str):
        return given
    content = calibration_set(given["set"]).model_dump(mode="json", exclude={"description"})
    if "dataset" in given or given.get("mixture", content["mixture"]) != content["mixture"]:
        key = "dataset" if "dataset" in given else "mixture"
        raise ValueError(f"set and {key} are given, got {given['set']!r} and data; remove one of them")
    return {**content, **given}


@cache
def gates() -> dict[str, dict[str, Thresholds]]:
    """The shipped gates: name of a set -> family of recipes -> thresholds (``configs/gates.yaml``)."""
    raw: dict[str, dict[str, Any]] = yaml.safe_load((configs() / "gates.yaml").read_text())
    return {
        name: {family: Thresholds.model_validate(values) for family, values in families.items()}
        for name, families in raw.items()
    }
