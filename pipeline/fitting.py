"""What a plan refuses: models that can't be quantized, recipes that don't fit a model's layers; with what would do."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.sizing import in_features, quantizable
from pipeline.sources import Source
from workers.fits import CONV1D_MODEL_TYPES, EXPERT, conv1d_misfit, experts_misfit
from workers.recipes import IntScheme, MicroscalingScheme, Recipe
from workers.unsupported import why_unsupported


def model_problem(source: Source) -> str | None:
    """Why a model of this family can't be quantized at all; or None."""
    family = source.config.get("model_type")
    reason = why_unsupported(family) if isinstance(family, str) else None
    return f"model {source.pin.id!r}: model_type {family!r} isn't supported: {reason}; leave it out" if reason else None


def recipe_problems(source: Source, recipe: Recipe) -> Iterator[str]:
    """What is wrong with a recipe for a model, and what would do."""
    problem = format_problem(source, recipe) or group_size_problem(source, recipe)
    if problem:
        yield problem


def format_problem(source: Source, recipe: Recipe) -> str | None:
    """Layers of the model that the recipe's format doesn't take; or None."""
    if source.config.get("model_type") in CONV1D_MODEL_TYPES:
        misfit, names = conv1d_misfit(recipe.format), ["its layers"]
    else:
        misfit = experts_misfit(recipe.format, recipe.scheme)
        names = [t.name for t in source.tensors if EXPERT.search(t.name) and quantizable(t, recipe)]
    if not misfit or not names:
        return None
    return (
        f"recipe {recipe.name!r}, format {recipe.format}: {names[0]} of {source.pin.id!r} {misfit}; or give that model "
        "recipes of its own (models: [{id: ..., recipes: [...]}])"
    )


def group_size_problem(source: Source, recipe: Recipe) -> str | None:
    """What is wrong with an integer recipe's group size for the model's layer widths, and what would do; or None."""
    scheme = recipe.scheme
    if isinstance(scheme, MicroscalingScheme) and source.tensors:
        return _indivisible(source, recipe, scheme)
    if not isinstance(scheme, IntScheme) or not scheme.group_size or not source.tensors:
        return None
    widths = sorted({in_features(t, source.config) for t in source.tensors if quantizable(t, recipe)})
    odd = [width for width in widths if width % scheme.group_size]
    if not odd or (len(odd) < len(widths) and scheme.indivisible != "refuse"):
        return None
    usual = [size for size in (256, 128, 64, 32, 16) if size < max(widths) and not any(w % size for w in widths)]
    remedy = [f"scheme.group_size: {usual[0]}"] if usual else []
    remedy.append("scheme.group_size: null (one scale for each output channel)")
    if len(odd) < len(widths):
        remedy.append("scheme.indivisible: channel or keep, for those layers alone")
    return (
        f"recipe {recipe.name!r}: group size {scheme.group_size} doesn't divide the layer widths of "
        f"{source.pin.id!r}, got {odd} (of {widths}); set " + ", or ".join(remedy)
    )


def _indivisible(source: Source, recipe: Recipe, scheme: MicroscalingScheme) -> str | None:
    size = scheme.group_size
    names = [t.name for t in source.tensors if quantizable(t, recipe) and in_features(t, source.config) % size]
    if not names:
        return None
    return (
        f"recipe {recipe.name!r}: {scheme.type} has groups of {size}, which don't divide the width of {names[0]} of "
        f"{source.pin.id!r}; ignore such layers, or choose another scheme"
    )
