"""Determines the scheme of each weight under a recipe, and the deviations from the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from workers.errors import UnsupportedRecipe
from workers.model.loading import QuantizableWeight, StreamedModel
from workers.model.unpackable import unpackable_modules
from workers.spec.formats import FORMATS
from workers.spec.layers import LayerScheme, scheme_for
from workers.spec.recipes import LinearRecipe
from workers.spec.schemes import IntScheme, LinearScheme, Scheme

UNPACKABLE = "transformers reads its plain weight while it loads, and a packed one has none"


def schemes_of(recipe: LinearRecipe, streamed: StreamedModel) -> dict[str, LinearScheme]:
    """The scheme of each weight that the recipe quantizes, by checkpoint key; all deviations included.

    Raises:
        UnsupportedRecipe: nothing is left to quantize, or the scheme refuses a weight's shape.
    """
    chosen = {weight.key: _chosen(recipe, weight) for weight in streamed.weights if not recipe.ignores(weight.module)}
    schemes = {key: cast(LinearScheme, layer.scheme) for key, layer in chosen.items() if layer.scheme is not None}
    unloadable = _unloadable(recipe, streamed, schemes)
    if schemes and len(unloadable) == len(schemes):
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: transformers reads the plain weight of every linear layer of "
            f"{type(streamed.model).__name__} while it loads, and packed weights have none; choose a scheme or format "
            f"that keeps one ({', '.join(_formats_with_weight(recipe.scheme))}, or activations: int8)"
        )
    for key in unloadable:
        del schemes[key]
    if not schemes:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)} and a scheme that "
            "fits no other layer; shorten ignore, or choose another scheme"
        )
    return schemes


def _chosen(recipe: LinearRecipe, weight: QuantizableWeight) -> LayerScheme:
    chosen = scheme_for(recipe, weight.module, weight.shape_OI)
    if chosen.refused:
        remedy = (
            "set scheme.group_size to a divisor or null, or scheme.indivisible to channel or keep"
            if isinstance(chosen.wanted, IntScheme)
            else "ignore that layer, or choose another scheme"
        )
        raise UnsupportedRecipe(f"recipe {recipe.name!r}: {chosen.why} of {weight.module}; {remedy}")
    return chosen


def _formats_with_weight(scheme: Scheme) -> list[str]:
    return [row.name for row in FORMATS.values() if not row.without_weight(scheme)]


def _unloadable(recipe: LinearRecipe, streamed: StreamedModel, schemes: Mapping[str, LinearScheme]) -> list[str]:
    """Keys of packed weights that transformers couldn't load."""
    without_weight = FORMATS[recipe.format].without_weight
    packed = [weight for weight in streamed.weights if weight.key in schemes and without_weight(schemes[weight.key])]
    unpackable = unpackable_modules(streamed) if packed else frozenset()
    return [weight.key for weight in packed if weight.input.module in unpackable]


def deviations(
    recipe: LinearRecipe, weights: Iterable[QuantizableWeight], schemes: Mapping[str, LinearScheme]
) -> list[str]:
    """Deviations from the recipe because of a layer's shape or kind, one line per layer."""
    lines = []
    for weight in weights:
        scheme = schemes.get(weight.key)
        if recipe.ignores(weight.module) or scheme == recipe.scheme_of(weight.module):
            continue
        what = "left in half precision" if scheme is None else "one scale for each output"
        why = scheme_for(recipe, weight.module, weight.shape_OI).why or UNPACKABLE
        lines.append(f"{what}, for {why}: {weight.module}")
    return lines
