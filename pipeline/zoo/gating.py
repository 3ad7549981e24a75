"""Which thresholds an artifact has to keep: the shipped ones, and over them what a zoo and its models say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from workers.errors import ZooError
from workers.spec.base import Frozen
from workers.spec.job import Thresholds
from workers.spec.recipes import Recipe


class Gate(Frozen):
    """Some thresholds; those left out stay what they are."""

    kl_mean: float | None = Field(None, gt=0, description="At most, in nats for each token (upper bound).")
    top1_agreement: float | None = Field(None, gt=0, le=1, description="At least (Wilson lower bound).")
    perplexity_ratio: float | None = Field(None, gt=1, description="At most, quantized over reference (upper bound).")
    runtime_logit_difference: float | None = Field(None, gt=0, description="At most, in standard deviations.")
    kl_least: float | None = Field(None, ge=0, description="Less, in nats, is ANOMALOUS: it isn't quantized.")
    perplexity_ratio_least: float | None = Field(None, gt=0, lt=1, description="Better is ANOMALOUS (upper bound).")


# By a family of recipes (w4, nf4, ...), or by the name of a recipe, which comes after.
Gates = dict[str, Gate]


def thresholds(shipped: Mapping[str, Thresholds], said: Sequence[Mapping[str, Gate]], recipe: Recipe) -> Thresholds:
    """Those of a recipe: what comes later in ``said`` (the zoo's, the model's) goes over what comes before.

    Raises:
        ZooError: a family that ``shipped`` doesn't have, not given whole.
    """
    family = recipe.scheme.family
    chosen: dict[str, Any] = shipped[family].model_dump() if family in shipped else {}
    for gates in said:
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
    """Keys that are neither a recipe of the zoo nor the family of one."""
    known = {recipe.name for recipe in recipes} | {recipe.scheme.family for recipe in recipes}
    return sorted(set(gates) - known)
