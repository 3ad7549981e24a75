"""Refuse models that can't be quantized and recipes that don't fit a model's layers, and name a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.planning.sources import PinnedModel
from workers.spec.auto_classes import PREPARED_BY, is_multimodal
from workers.spec.data import Calibration
from workers.spec.formats import FORMATS, group_size_held
from workers.spec.layers import (
    EXPERT,
    LayerKinds,
    LayerScheme,
    kinds_of,
    loaded_dtype,
    out_in_shape,
    quantizable,
    scheme_for,
)
from workers.spec.libraries import TYPES
from workers.spec.recipe_base import GridRecipe
from workers.spec.recipes import KeepRecipe, LibraryRecipe, Recipe
from workers.spec.runtimes import checkers, misfit
from workers.spec.schemes import IntScheme, MicroscalingScheme, Scheme
from workers.spec.tensors import TensorHeader

USUAL_GROUP_SIZES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class _Layer:
    """A weight that a recipe quantizes, and the scheme chosen for it."""

    name: str
    shape_OI: tuple[int, int]
    fit: LayerScheme


def model_problem(source: PinnedModel) -> str | None:
    """Why models of this family can't be quantized at all, or None."""
    family, kind = source.family, source.config.get("model_type")
    reason = family.refused or (family.refused_whole if is_multimodal(source.config) else family.refused_alone)
    if not reason and family.package and find_spec(family.package) is None:
        return (
            f"model {source.pin.id!r}: model_type {kind!r}: its class needs the package {family.package}, which isn't "
            f"installed; pip install {family.package} on every node, or leave it out"
        )
    if not reason:
        return None
    return f"model {source.pin.id!r}: model_type {kind!r} isn't supported: {reason}; leave it out"


def picture_problems(source: PinnedModel, calibration: Calibration) -> Iterator[str]:
    """Why a model can't be calibrated on the pictures or sounds of a data set, as far as the plan sees."""
    shows = next((dataset.shows for dataset in calibration.datasets if dataset.shows), "")
    if not shows:
        return
    if not is_multimodal(source.config):
        yield (
            f"calibration: {shows} are named, but {source.pin.id!r} takes text alone "
            f"({', '.join(source.config.get('architectures') or ['no class'])}); put it into a zoo with text"
        )
    elif source.pin.folder and not any((Path(source.pin.folder) / name).is_file() for name in PREPARED_BY):
        yield (
            f"calibration: {shows} are named, but {source.pin.id!r} comes without a processor "
            f"({' or '.join(PREPARED_BY)}); add the original model's files, or name text"
        )


def recipe_problems(source: PinnedModel, recipe: Recipe, runtimes: Sequence[str] = ()) -> Iterator[str]:
    """Why a recipe doesn't fit a model, with a remedy; empty if it fits.

    ``runtimes`` check its artifacts; none named: the one of its format.
    """
    layers = [_layer(source, recipe, tensor) for tensor in source.tensors if quantizable(tensor, recipe)]
    if not source.tensors and source.family.conv1d:  # a pickled checkpoint has no headers, but its family is known
        layers = [_Layer("its layers", (0, 0), LayerScheme(recipe.scheme, recipe.scheme))]
    if source.tensors and not layers and not isinstance(recipe, KeepRecipe):
        yield (
            f"recipe {recipe.name!r}: nothing of {source.pin.id!r} is left to quantize, got ignore "
            f"{list(recipe.ignore)}, include {recipe.include and list(recipe.include)}, layers {recipe.layers}; "
            "`quantmill plan --modules` shows the names of a model's modules"
        )
    problem = (
        _library_problem(source, recipe)
        or _runtime_problem(source, recipe, layers, runtimes)
        or _shape_problem(source, recipe, layers)
    )
    if problem:
        yield problem


def _library_problem(source: PinnedModel, recipe: Recipe) -> str | None:
    """Why a library can't be trusted with a model, as a message with a remedy; or None."""
    if not isinstance(recipe, LibraryRecipe):
        return None
    kinds = {
        "is a mixture of experts, some of which libraries store so that transformers reads random weights": any(
            EXPERT.search(tensor.name) for tensor in source.tensors
        ),
        "has its layers in Conv1D modules, which aren't linear ones to libraries": source.family.conv1d,
        "has more than text layers": is_multimodal(source.config),
        "is quantized already, and libraries read the original alone": bool(source.kept or source.pin.dequantize),
    }
    known = TYPES.get(recipe.engine)
    kind = str(source.config.get("model_type") or "")
    if known is not None:
        kinds[f"is of the type {kind!r}, and this archived library makes {', '.join(known)} alone"] = kind not in known
    why = next((words for words, found in kinds.items() if found), None)
    return why and (
        f"recipe {recipe.name!r}: engine {recipe.engine!r}: {source.pin.id!r} {why}; leave engine out for quantmill's "
        "own, or give that model recipes of its own (models: [{id: ..., recipes: [...]}])"
    )


def _layer(source: PinnedModel, recipe: Recipe, tensor: TensorHeader) -> _Layer:
    shape_OI = out_in_shape(tensor, conv1d=source.family.conv1d)
    return _Layer(tensor.name, shape_OI, scheme_for(recipe, tensor.name.removesuffix(".weight"), shape_OI))


def _runtime_problem(
    source: PinnedModel, recipe: Recipe, layers: Iterable[_Layer], runtimes: Sequence[str]
) -> str | None:
    """The first layer that a runtime which checks the recipe can't read, as a message; or None."""
    first: dict[tuple[Scheme, LayerKinds], str] = {}
    dtype, model_type = loaded_dtype(source.config, source.tensors), str(source.config.get("model_type") or "")
    multimodal = is_multimodal(source.config)
    whole = LayerKinds(conv1d=source.family.conv1d, dtype=dtype, model_type=model_type)
    if runtimes:  # the formats' own look at each layer by itself
        whole = kinds_of(recipe, source.tensors, conv1d=source.family.conv1d, dtype=dtype, model_type=model_type)
    for layer in layers:
        kinds = whole._replace(multimodal=multimodal, experts=EXPERT.search(layer.name) is not None)
        first.setdefault((layer.fit.wanted, kinds), layer.name)
    for runtime in checkers(recipe.format, runtimes):
        for (scheme, kinds), name in first.items():
            if why := runtime.reads(recipe.format, scheme, kinds):
                other = f", or take {runtime.name} out of verify.runtimes" if runtimes else ""
                return (
                    f"recipe {recipe.name!r}, format {recipe.format}: {name} of {source.pin.id!r} {why}; or give that "
                    f"model recipes of its own (models: [{{id: ..., recipes: [...]}}]){other}"
                )
    return None


def _shape_problem(source: PinnedModel, recipe: Recipe, layers: list[_Layer]) -> str | None:
    """Layers whose shapes the recipe's schemes or format don't support, as a message with a remedy; or None."""
    # `indivisible` may substitute the scheme of some layers; if it would of all of them, the recipe doesn't fit.
    none_fits = all(layer.fit.why for layer in layers)
    refused = [layer for layer in layers if layer.fit.remedy or none_fits]
    if not refused:
        return None
    first = next((layer for layer in refused if layer.fit.unpackable), refused[0])
    scheme = first.fit.wanted
    if isinstance(scheme, IntScheme | MicroscalingScheme) and not first.fit.unpackable:
        return _group_size_problem(source, recipe, scheme, [layer for layer in layers if layer.fit.wanted == scheme])
    return (
        f"recipe {recipe.name!r}: {first.fit.why}: {first.name} of {source.pin.id!r}; ignore such layers, or choose "
        "another scheme or format"
    )


def _group_size_problem(
    source: PinnedModel, recipe: Recipe, scheme: IntScheme | MicroscalingScheme, alike: list[_Layer]
) -> str:
    if isinstance(scheme, MicroscalingScheme):
        name = next(layer.name for layer in alike if layer.fit.why)
        return (
            f"recipe {recipe.name!r}: {scheme.type} has groups of {scheme.group_size}, which don't divide the width of "
            f"{name} of {source.pin.id!r}; ignore such layers, or choose another scheme"
        )
    assert scheme.group_size is not None, "a scale for each output fits every width"
    where = _where(recipe, scheme)
    widths = sorted({layer.shape_OI[1] for layer in alike})
    odd = [width for width in widths if width % scheme.group_size]
    usual = [
        size
        for size in USUAL_GROUP_SIZES
        if size < max(widths) and not any(w % size for w in widths) and _readable(recipe, scheme, size)
    ]
    remedy = [f"{where}.group_size: {usual[0]}"] if usual else []
    if _readable(recipe, scheme, None):
        remedy.append(f"{where}.group_size: null (one scale for each output channel)")
    if len(odd) < len(widths):
        remedy.append(f"{where}.indivisible: channel or keep, for those layers alone")
    return (
        f"recipe {recipe.name!r}: group size {scheme.group_size} doesn't divide the layer widths of "
        f"{source.pin.id!r}, got {odd} (of {widths}); "
        + (f"set {', or '.join(remedy)}" if remedy else "ignore such layers, or choose another format")
    )


def _readable(recipe: Recipe, scheme: IntScheme, group_size: int | None) -> bool:
    """Whether the recipe's format has the scheme with another group size, in the runtime that checks it."""
    other = scheme.model_copy(update={"group_size": group_size})
    return group_size_held(FORMATS[recipe.format], other) and misfit(recipe.format, other, LayerKinds()) is None


def _where(recipe: Recipe, scheme: IntScheme) -> str:
    """The key of the recipe that sets a scheme."""
    if scheme == recipe.scheme or not isinstance(recipe, GridRecipe):
        return "scheme"
    override_index = next(
        override_index for override_index, override in enumerate(recipe.overrides) if override.scheme == scheme
    )
    return f"overrides.{override_index}.scheme"
