"""Determines the scheme of each weight under a recipe, and the deviations from the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from workers.errors import UnsupportedRecipe
from workers.model.loading import InputName, QuantizableWeight, StreamedModel
from workers.model.unpackable import unpackable_modules
from workers.spec.formats import FORMATS, formats_that_hold
from workers.spec.layers import LayerScheme, scheme_for
from workers.spec.patterns import part_of_layer
from workers.spec.recipes import LinearRecipe
from workers.spec.schemes import LinearScheme, Scheme

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
            f"{type(streamed.model).__name__} while it loads, and packed weights have none; choose "
            f"{_formats_with_weight(recipe.scheme)} that keeps one (activations: int8, fp8, or method: bitsandbytes)"
        )
    for key in unloadable:
        del schemes[key]
    if not schemes:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)} and a scheme that "
            "fits no other layer; shorten ignore, or choose another scheme"
        )
    return schemes


def outside_weights(recipe: LinearRecipe, streamed: StreamedModel) -> dict[str, QuantizableWeight]:
    """Embeddings and head, if the recipe quantizes them, by checkpoint key.

    A head that is stored though the model uses its embeddings' matrix isn't one of them: no reader uses it.

    Raises:
        UnsupportedRecipe: the scheme refuses a weight's shape.
    """
    model, speaking = streamed.model, streamed.language_model
    tied = is_tied(model)
    head = None if tied else speaking.get_output_embeddings()
    modules = {"embeddings": speaking.get_input_embeddings(), "head": head}
    names = {f"{name}.weight" for name, module in model.named_modules() if any(module is m for m in modules.values())}
    found = {}
    for key in streamed.outside_keys:
        owner, module, header = streamed.owners.get(key), key.removesuffix(".weight"), streamed.source.headers[key]
        if owner in names and len(header.shape) == 2 and recipe.scheme_outside(module) is not None:
            rows, columns = header.shape
            found[key] = QuantizableWeight(key, -1, InputName(owner, None), (rows, columns), False)
    return found


def speculative_weights(recipe: LinearRecipe, streamed: StreamedModel) -> dict[str, QuantizableWeight]:
    """The linear layers of speculative blocks that have a decoder layer's names and shapes, by checkpoint key."""
    if recipe.mtp == "keep":
        return {}
    known = {(part_of_layer(weight.key), weight.shape_OI) for weight in streamed.weights if not weight.transposed}
    found = {}
    for key in sorted(streamed.speculative):
        shape, module = streamed.source.headers[key].shape, key.rpartition(".")[0]
        if (part_of_layer(key), shape) in known and not recipe.ignores(module):
            found[key] = QuantizableWeight(key, -1, InputName(key, None), (shape[0], shape[1]), False)
    return found


def left_outside(recipe: LinearRecipe, streamed: StreamedModel, found: Mapping[str, QuantizableWeight]) -> list[str]:
    """Deviations: embeddings or a head that the recipe quantizes, and ``outside_weights`` didn't find."""
    if recipe.outside is None:
        return []
    model, speaking, modules = (
        streamed.model,
        streamed.language_model,
        {weight.input.module for weight in found.values()},
    )
    wanted = [("embeddings", recipe.outside.embeddings, speaking.get_input_embeddings())]
    if not is_tied(model):
        wanted.append(("head", recipe.outside.head, speaking.get_output_embeddings()))
    names = {id(module): name for name, module in model.named_modules()}
    return [
        f"left in half precision, for no name of {what} is known that fits: {names.get(id(module), what)}"
        for what, scheme, module in wanted
        if scheme is not None and names.get(id(module)) not in modules
    ]


def is_tied(model: Any) -> bool:
    """Whether the head's matrix is the embeddings'."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def scheme_outside(recipe: LinearRecipe, weight: QuantizableWeight) -> LinearScheme:
    """The scheme of a weight outside of the layers.

    Raises:
        UnsupportedRecipe: it refuses the weight's shape.
    """
    chosen = _chosen(recipe, weight)
    if chosen.scheme is None:
        raise UnsupportedRecipe(f"recipe {recipe.name!r}: outside: {weight.module}: {chosen.why}; leave it out there")
    return cast(LinearScheme, chosen.scheme)


def scheme_in_block(recipe: LinearRecipe, weight: QuantizableWeight) -> LinearScheme | None:
    """The scheme of a speculative block's weight; None if it stays in half precision.

    Raises:
        UnsupportedRecipe: the scheme refuses its shape.
    """
    return cast(LinearScheme | None, _chosen(recipe, weight).scheme)


def _chosen(recipe: LinearRecipe, weight: QuantizableWeight) -> LayerScheme:
    chosen = scheme_for(recipe, weight.module, weight.shape_OI)
    if chosen.remedy:
        raise UnsupportedRecipe(f"recipe {recipe.name!r}: {weight.module}: {chosen.why}; {chosen.remedy}")
    return chosen


def _formats_with_weight(scheme: Scheme) -> str:
    """The formats that hold a scheme and keep a plain weight, to end an error message."""
    names = [name for name in formats_that_hold(scheme) if not FORMATS[name].without_weight(scheme)]
    return f"format: {' or '.join(names)}, or another scheme" if names else "another scheme"


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
