"""Which modules of a model a recipe quantizes, how, and what keeps the others as they are."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from pipeline.planning.configs import setting
from pipeline.planning.sources import PinnedModel
from workers.errors import UnsupportedRecipe
from workers.spec import ggml
from workers.spec.layers import (
    EXPERT,
    experts_left,
    is_matrix_of_a_layer,
    is_quantized_outside,
    is_tiny,
    layer_of,
    out_in_shape,
    quantizable,
    scheme_for,
)
from workers.spec.patterns import LAYER, chosen_layers, in_ranges
from workers.spec.recipes import GgufRecipe, Recipe
from workers.spec.tensors import TensorHeader

# Number of an expert in a module's name.
_EXPERT_NUMBER = re.compile(r"(\.experts\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Modules:
    """Modules of several layers that have the same fate: ``name`` with the layers' numbers in braces.

    ``scheme`` is in words; empty for those that stay as they are, of which ``why`` says what leaves them.
    """

    name: str
    count: int
    shape_OI: tuple[int, int]
    scheme: str
    why: str


def with_layers_of(source: PinnedModel, recipe: Recipe) -> Recipe:
    """The recipe with its ``layers`` as numbers from the beginning of a model.

    Raises:
        UnsupportedRecipe: the model has no such layer.
    """
    if recipe.layers is None:
        return recipe
    try:
        chosen = chosen_layers(recipe.layers, _layers(source))
    except ValueError as error:
        raise UnsupportedRecipe(f"recipe {recipe.name!r}, {source.pin.id!r}: {error}") from error
    return recipe.model_copy(update={"layers": in_ranges(chosen)})


def _layers(source: PinnedModel) -> int:
    """The number of a model's decoder layers; by its config, if its tensors can't be read beforehand."""
    numbers = [int(number) for tensor in source.tensors if (number := layer_of(tensor.name)) is not None]
    said = setting(source.config, "num_hidden_layers") or setting(source.config, "n_layer")
    return max(numbers) + 1 if numbers else int(said) if isinstance(said, int) else 0


def modules_of(source: PinnedModel, recipe: Recipe) -> list[Modules]:
    """All matrices of a model under a recipe, alike ones in one row, in the order of the checkpoint.

    ``recipe`` is one of a plan's orders, whose layers are numbers from the beginning.
    """
    found: dict[tuple[str, tuple[int, int], str, str], list[str]] = defaultdict(list)
    for tensor in source.tensors:
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
            module = tensor.name.removesuffix(".weight")
            conv1d = source.family.conv1d and layer_of(tensor.name) is not None
            shape_OI = out_in_shape(tensor, conv1d=conv1d)
            found[(_in_all_layers(module), shape_OI, *_fate(tensor, module, shape_OI, recipe))].append(module)
    return [
        Modules(_named(name, members), len(members), shape_OI, scheme, why)
        for (name, shape_OI, scheme, why), members in found.items()
    ]


def _fate(tensor: TensorHeader, module: str, shape_OI: tuple[int, int], recipe: Recipe) -> tuple[str, str]:
    """The scheme of a matrix in words, or why it stays as it is."""
    if _in_a_mix(tensor, module, recipe):
        return recipe.scheme.words(), ""
    if not quantizable(tensor, recipe):
        return "", _why_left(tensor, module, recipe)
    fit = scheme_for(recipe, module, shape_OI)
    return ("", fit.why or "the format can't pack it") if fit.scheme is None else (fit.scheme.words(), fit.why or "")


def _in_a_mix(tensor: TensorHeader, module: str, recipe: Recipe) -> bool:
    """Whether a mix of ggml's types has one for the matrix: also for embeddings and head."""
    name = ggml.planned_name(tensor.name) if isinstance(recipe, GgufRecipe) else None
    return name is not None and ggml.is_quantized(name, 2) and not recipe.ignores(module)


def _why_left(tensor: TensorHeader, module: str, recipe: Recipe) -> str:
    if not is_matrix_of_a_layer(tensor) and not is_quantized_outside(tensor, recipe):
        return "outside of the decoder's layers"
    if why := recipe.why_ignored(module):
        return why
    if is_tiny(tensor.shape):
        return "too small"
    left = experts_left(recipe) if EXPERT.search(tensor.name) else None
    return left or "not a linear layer's weight"


def _in_all_layers(module: str) -> str:
    """A module's name without the numbers of its layer and expert."""
    match = LAYER.search(f"{module}.")
    name = module if match is None else f"{module[: match.start(1)]}*{module[match.end(1) :]}"
    return _EXPERT_NUMBER.sub(r"\1*", name)


def _named(name: str, members: list[str]) -> str:
    """The name with the numbers of its layers."""
    numbers = [int(match[1]) for module in members if (match := LAYER.search(f"{module}."))]
    return name.replace("*", f"{{{in_ranges(numbers)}}}", 1) if numbers else name
