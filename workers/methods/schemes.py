"""What each weight of a model is quantized to under a recipe, and where that isn't what the recipe says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workers.errors import UnsupportedRecipe
from workers.loading import QuantizableWeight
from workers.numerics import fp8
from workers.recipes import Float8Scheme, IntScheme, LinearRecipe, LinearScheme


def schemes_of(recipe: LinearRecipe, weights: Iterable[QuantizableWeight]) -> dict[str, LinearScheme]:
    """What each weight that the recipe quantizes is quantized to, by checkpoint key; deviations by width included.

    Raises:
        UnsupportedRecipe: nothing is left to quantize, or a width that the group size doesn't divide is refused.
    """
    found = {}
    for weight in weights:
        scheme = None if recipe.ignores(weight.module) else _scheme_of(recipe, weight)
        if scheme is not None:
            found[weight.key] = scheme
    if not found:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)} and a scheme that "
            "fits no other layer; shorten ignore, or choose another scheme"
        )
    return found


def _scheme_of(recipe: LinearRecipe, weight: QuantizableWeight) -> LinearScheme | None:
    scheme, width = recipe.scheme_of(weight.module), weight.shape_OI[1]
    if _in_blocks(scheme):
        return None if any(side % fp8.BLOCK for side in weight.shape_OI) else scheme
    size = None if scheme.type == "fp8" else scheme.group_size
    if size is None or width % size == 0:
        return scheme
    choice = scheme.indivisible if isinstance(scheme, IntScheme) else "refuse"
    if isinstance(scheme, IntScheme) and choice == "channel":
        return scheme.model_copy(update={"group_size": None})
    if choice == "keep":
        return None
    remedy = (
        "set scheme.group_size to a divisor or null, or scheme.indivisible to channel or keep"
        if isinstance(scheme, IntScheme)
        else f"ignore that layer, or choose another scheme: {scheme.type} has groups of {size}"
    )
    raise UnsupportedRecipe(
        f"recipe {recipe.name!r}: group size {size} doesn't divide the width {width} of {weight.module}; {remedy}"
    )


def _in_blocks(scheme: LinearScheme) -> bool:
    return isinstance(scheme, Float8Scheme) and scheme.scales == "block"


def deviations(
    recipe: LinearRecipe, weights: Iterable[QuantizableWeight], schemes: Mapping[str, LinearScheme]
) -> list[str]:
    """What is done otherwise than the recipe says because of a layer's width, a line for each layer."""
    found = []
    for weight in weights:
        scheme, width = schemes.get(weight.key), weight.shape_OI[1]
        wanted = recipe.scheme_of(weight.module)
        if recipe.ignores(weight.module) or scheme == wanted:
            continue
        if _in_blocks(wanted):
            sides = " x ".join(map(str, weight.shape_OI))
            found.append(f"left in half precision, for {fp8.BLOCK} doesn't divide both of {sides}: {weight.module}")
            continue
        size = None if wanted.type == "fp8" else wanted.group_size
        what = "left in half precision" if scheme is None else "one scale for each output"
        found.append(f"{what}, for the group size {size} doesn't divide the width {width}: {weight.module}")
    return found
