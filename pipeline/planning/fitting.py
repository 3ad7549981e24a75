"""Refuse models that can't be quantized and recipes that don't fit a model's layers, and name a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.planning.sources import PinnedModel
from workers.spec.layers import EXPERT, LayerKinds, LayerScheme, out_in_shape, quantizable, scheme_for
from workers.spec.recipes import IntRecipe, Recipe
from workers.spec.runtimes import misfit
from workers.spec.schemes import IntScheme, MicroscalingScheme, Scheme
from workers.spec.tensors import TensorHeader

USUAL_GROUP_SIZES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class _Layer:
    """A weight that a recipe quantizes, and the scheme chosen for it."""

    name: str
    shape_OI: tuple[int, int]
    gets: LayerScheme


def model_problem(source: PinnedModel) -> str | None:
    """Why models of this family can't be quantized at all, or None."""
    reason = source.family.refused
    if not reason:
        return None
    kind = source.config.get("model_type")
    return f"model {source.pin.id!r}: model_type {kind!r} isn't supported: {reason}; leave it out"


def recipe_problems(source: PinnedModel, recipe: Recipe) -> Iterator[str]:
    """Why a recipe doesn't fit a model, with a remedy; empty if it fits."""
    layers = [_layer(source, recipe, tensor) for tensor in source.tensors if quantizable(tensor, recipe)]
    problem = _format_problem(source, recipe, layers) or _shape_problem(source, recipe, layers)
    if problem:
        yield problem


def _layer(source: PinnedModel, recipe: Recipe, tensor: TensorHeader) -> _Layer:
    shape_OI = out_in_shape(tensor, conv1d=source.family.conv1d)
    return _Layer(tensor.name, shape_OI, scheme_for(recipe, tensor.name.removesuffix(".weight"), shape_OI))


def _format_problem(source: PinnedModel, recipe: Recipe, layers: Iterable[_Layer]) -> str | None:
    """The first layer that the runtime which checks the recipe's format can't read, as a message; or None."""
    first: dict[tuple[Scheme, LayerKinds], str] = {}
    for layer in layers:
        kinds = LayerKinds(experts=EXPERT.search(layer.name) is not None, conv1d=source.family.conv1d)
        first.setdefault((layer.gets.wanted, kinds), layer.name)
    for (scheme, kinds), name in first.items():
        why = misfit(recipe.format, scheme, kinds)
        if why:
            return (
                f"recipe {recipe.name!r}, format {recipe.format}: {name} of {source.pin.id!r} {why}; or give that "
                "model recipes of its own (models: [{id: ..., recipes: [...]}])"
            )
    return None


def _shape_problem(source: PinnedModel, recipe: Recipe, layers: list[_Layer]) -> str | None:
    """Layers whose shapes the recipe's schemes or format don't support, as a message with a remedy; or None."""
    for scheme in dict.fromkeys(layer.gets.wanted for layer in layers):
        alike = [layer for layer in layers if layer.gets.wanted == scheme]
        deviating = [layer for layer in alike if layer.gets.why]
        # `indivisible` may substitute the scheme of some layers; if it would of all of them, the recipe doesn't fit.
        refused = [layer for layer in deviating if layer.gets.refused or len(deviating) == len(alike)]
        if not refused:
            continue
        size = scheme.group_size if isinstance(scheme, IntScheme | MicroscalingScheme) else None
        if size is not None and any(layer.shape_OI[1] % size for layer in refused):
            return _group_size_problem(source, recipe, scheme, alike)
        return (
            f"recipe {recipe.name!r}: {refused[0].gets.why}: {refused[0].name} of {source.pin.id!r}; ignore such "
            "layers, or choose another scheme or format"
        )
    return None


def _group_size_problem(source: PinnedModel, recipe: Recipe, scheme: Scheme, alike: list[_Layer]) -> str:
    if isinstance(scheme, MicroscalingScheme):
        name = next(layer.name for layer in alike if layer.gets.why)
        return (
            f"recipe {recipe.name!r}: {scheme.type} has groups of {scheme.group_size}, which don't divide the width of "
            f"{name} of {source.pin.id!r}; ignore such layers, or choose another scheme"
        )
    assert isinstance(scheme, IntScheme), "fp8 has no groups"
    assert scheme.group_size is not None, "a scale for each output fits every width"
    where = _where(recipe, scheme)
    widths = sorted({layer.shape_OI[1] for layer in alike})
    odd = [width for width in widths if width % scheme.group_size]
    usual = [size for size in USUAL_GROUP_SIZES if size < max(widths) and not any(w % size for w in widths)]
    remedy = [f"{where}.group_size: {usual[0]}"] if usual else []
    remedy.append(f"{where}.group_size: null (one scale for each output channel)")
    if len(odd) < len(widths):
        remedy.append(f"{where}.indivisible: channel or keep, for those layers alone")
    return (
        f"recipe {recipe.name!r}: group size {scheme.group_size} doesn't divide the layer widths of "
        f"{source.pin.id!r}, got {odd} (of {widths}); set " + ", or ".join(remedy)
    )


def _where(recipe: Recipe, scheme: IntScheme) -> str:
    """The key of the recipe that sets a scheme."""
    if scheme == recipe.scheme or not isinstance(recipe, IntRecipe):
        return "scheme"
    override_index = next(
        override_index for override_index, override in enumerate(recipe.overrides) if override.scheme == scheme
    )
    return f"overrides.{override_index}.scheme"
