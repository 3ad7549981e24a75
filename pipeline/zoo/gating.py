"""Choose the thresholds of an artifact: the shipped ones, overridden by the zoo's and then by the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from workers.errors import ZooError
from workers.spec.base import Frozen
from workers.spec.job import Thresholds
from workers.spec.recipes import Recipe


class Gate(Frozen):
    """Overrides of single thresholds; those left out keep their value."""

    kl_mean: float | None = Field(None, gt=0, description="At most, in nats for each token (upper bound).")
    top1_agreement: float | None = Field(None, gt=0, le=1, description="At least (Wilson lower bound).")
    perplexity_ratio: float | None = Field(None, gt=1, description="At most, quantized over reference (upper bound).")
    runtime_logit_difference: float | None = Field(None, gt=0, description="At most, in standard deviations.")
    kl_least: float | None = Field(None, ge=0, description="Less, in nats, is ANOMALOUS: it isn't quantized.")
    perplexity_ratio_least: float | None = Field(None, gt=0, lt=1, description="Better is ANOMALOUS (upper bound).")


# Keys are families of recipes (w4, nf4, ...) or names of recipes; a name overrides its family.
Gates = dict[str, Gate]


def thresholds(
    shipped: Mapping[str, Thresholds], overrides: Sequence[Mapping[str, Gate]], recipe: Recipe
) -> Thresholds:
    """The thresholds of a recipe: later entries of ``overrides`` (the zoo's, then the model's) override earlier ones.

    Raises:
        ZooError: ``shipped`` lacks the recipe's family, and ``overrides`` don't give all of its thresholds.
    """
    family = recipe.scheme.family
    chosen: dict[str, Any] = shipped[family].model_dump() if family in shipped else {}
    for gates in overrides:
        for key in (family, recipe.name):
            if key in gates:
                chosen |= gates[key].model_dump(exclude_none=True)
    try:
        return Thresholds.model_validate(chosen)
    except ValidationError as error:
        missing = ", ".join(str(problem["loc"][0]) for problem in error.errors())
        raise ZooError(
            f"verify.gates: no thresholds for the family {family!r} of recipe {recipe.name!r} ({missing}); the set has "
            f"{', '.join(sorted(shipped))}. Give verify.gates a mapping with {family!r}."
        ) from error


def unknown_keys(gates: Mapping[str, Gate], recipes: Sequence[Recipe]) -> list[str]:
    """Keys that name neither a recipe of the zoo nor the family of one, sorted."""
    known = {recipe.name for recipe in recipes} | {recipe.scheme.family for recipe in recipes}
    return sorted(set(gates) - known)
