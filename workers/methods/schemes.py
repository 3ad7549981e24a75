"""What each weight of a model is quantized to under a recipe, and where that isn't what the recipe says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workers.errors import UnsupportedRecipe
from workers.formats import compressed_tensors
from workers.loading import QuantizableWeight, StreamedModel
from workers.numerics import fp8
from workers.recipes import Float8Scheme, IntScheme, LinearRecipe, LinearScheme
from workers.reinitialized import unpackable_modules


def schemes_of(recipe: LinearRecipe, streamed: StreamedModel) -> dict[str, LinearScheme]:
    """What each weight that the recipe quantizes is quantized to, by checkpoint key; all deviations included.

    Raises:
        UnsupportedRecipe: nothing is left to quantize, or a width that the group size doesn't divide is refused.
    """
    found = {}
    for weight in streamed.weights:
        scheme = None if recipe.ignores(weight.module) else _scheme_of(recipe, weight)
        if scheme is not None:
            found[weight.key] = scheme
    unloadable = _unloadable(recipe, streamed, found)
    if found and len(unloadable) == len(found):
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: transformers reads the plain weight of every linear layer of "
            f"{type(streamed.model).__name__} while it loads, and packed weights have none; choose format: gptq or "
            "fp8, activations: int8, or method: bitsandbytes"
        )
    for key in unloadable:
        del found[key]
    if not found:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)} and a scheme that "
            "fits no other layer; shorten ignore, or choose another scheme"
        )
    return found


def _unloadable(recipe: LinearRecipe, streamed: StreamedModel, schemes: Mapping[str, LinearScheme]) -> list[str]:
    """Keys whose packed weight transformers wouldn't load."""
    if recipe.format != "compressed-tensors":
        return []
    packed = [w for w in streamed.weights if w.key in schemes and compressed_tensors.is_packed(schemes[w.key])]
    unpackable = unpackable_modules(streamed) if packed else frozenset()
    return [weight.key for weight in packed if weight.input[0].removesuffix(".weight") in unpackable]


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
    """What is done otherwise than the recipe says because of a layer's shape or kind, a line for each layer."""
    found = []
    for weight in weights:
        scheme, wanted = schemes.get(weight.key), recipe.scheme_of(weight.module)
        if recipe.ignores(weight.module) or scheme == wanted:
            continue
        what = "left in half precision" if scheme is None else "one scale for each output"
        found.append(f"{what}, for {_why(recipe, weight, wanted)}: {weight.module}")
    return found


def _why(recipe: LinearRecipe, weight: QuantizableWeight, wanted: LinearScheme) -> str:
    width = weight.shape_OI[1]
    if _in_blocks(wanted):
        return f"{fp8.BLOCK} doesn't divide both of {' x '.join(map(str, weight.shape_OI))}"
    size = None if wanted.type == "fp8" else wanted.group_size
    if size is not None and width % size:
        return f"the group size {size} doesn't divide the width {width}"
    return "transformers reads its plain weight while it loads, and a packed one has none"
