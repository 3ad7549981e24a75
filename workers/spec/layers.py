"""Determines which tensors a recipe quantizes, and to which scheme, from names and shapes: for plan and worker."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Self

from workers.spec.base import Frozen
from workers.spec.formats import FORMATS
from workers.spec.fusion import split_groups
from workers.spec.patterns import LAYER as LAYER
from workers.spec.patterns import is_speculative, part_of_layer
from workers.spec.patterns import layer_of as layer_of
from workers.spec.recipe_base import CodedRecipe
from workers.spec.recipes import Recipe
from workers.spec.schemes import FP8_BLOCK, AnyScheme, Float8Scheme, IntScheme, MicroscalingScheme, Scheme
from workers.spec.tensors import FLOATS, TensorHeader

# A weight of one expert; transformers fuses these into one tensor per layer on loading.
EXPERT = re.compile(r"\.experts\.\d+\.")
LEAST_NUMBERS = 128
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32", "float64": "F64"}
PACKING_REMEDY = "ignore that layer, or choose another format"
GROUP_REMEDY = "set scheme.group_size to a divisor or null, or scheme.indivisible to channel or keep"


class LayerKinds(NamedTuple):
    """Kinds of layers, besides plain linear ones, that a recipe quantizes; runtimes' support depends on them.

    ``conv1d``: stored (in, out), as in GPT-2. ``mixed``: more than one scheme. ``mixture``: the model is a mixture of
    experts, whether its experts are quantized (``experts``) or not. ``dtype`` is that of the model once it's loaded, by
    the name of safetensors headers; empty if unknown. ``split``: parts of what runtimes fuse have several schemes.
    ``multimodal``: the model takes pictures or sounds, too.
    """

    experts: bool = False
    conv1d: bool = False
    mixed: bool = False
    mixture: bool = False
    dtype: str = ""
    split: bool = False
    model_type: str = ""
    multimodal: bool = False


@dataclass(frozen=True)
class LayerScheme:
    """The scheme chosen for one weight: ``scheme``, None for half precision.

    ``why`` is the reason for a deviation from the recipe. ``remedy`` is set where the recipe accepts no substitute:
    what the user can do.
    """

    wanted: Scheme
    scheme: Scheme | None
    why: str | None = None
    remedy: str | None = None

    @property
    def unpackable(self) -> bool:
        """Whether the format can't pack the weight, whatever its groups."""
        return self.remedy == PACKING_REMEDY


class Layout(Frozen):
    """An engine's decisions: the scheme of every quantized module, by its name in the checkpoint.

    ``modules`` maps to indices into ``schemes``: a mixture of experts has tens of thousands of modules and few schemes.
    """

    schemes: tuple[AnyScheme, ...]
    modules: dict[str, int]

    @classmethod
    def of(cls, schemes: Mapping[str, Scheme]) -> Self:
        """The layout of modules with their schemes."""
        distinct = list(dict.fromkeys(schemes.values()))
        return cls(schemes=tuple(distinct), modules={name: distinct.index(scheme) for name, scheme in schemes.items()})


def is_tiny(shape: Sequence[int]) -> bool:
    """Whether a matrix has too few numbers for codes: nothing is saved, and none of its errors can be told (AltUp's
    coefficients of gemma3n are 4 x 4 and 16 x 4)."""
    return prod(shape) < LEAST_NUMBERS


def is_matrix_of_a_layer(tensor: TensorHeader) -> bool:
    """Whether a tensor is the weight matrix of a module inside a decoder layer."""
    return tensor.name.endswith(".weight") and len(tensor.shape) == 2 and layer_of(tensor.name) is not None


def in_speculative_layer(tensor: TensorHeader) -> bool:
    """Whether a tensor is a matrix in a numbered layer of a block that is called mtp."""
    matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    return matrix and is_speculative(tensor.name, sys.maxsize) and part_of_layer(tensor.name) is not None


def is_quantized_outside(tensor: TensorHeader, recipe: Recipe) -> bool:
    """Whether a tensor is the matrix of embeddings or head, and the recipe quantizes it."""
    module = tensor.name.removesuffix(".weight")
    inside = layer_of(tensor.name) is not None
    return not inside and len(tensor.shape) == 2 and recipe.scheme_outside(module) is not None


def quantizable(tensor: TensorHeader, recipe: Recipe) -> bool:
    """Whether the recipe quantizes this tensor: a matrix inside a decoder layer that isn't ignored, or one outside."""
    if is_quantized_outside(tensor, recipe):
        return True
    module = tensor.name.removesuffix(".weight")
    if isinstance(recipe, CodedRecipe) and recipe.mtp == "quantize" and in_speculative_layer(tensor):
        return not recipe.ignores(module)
    if not is_matrix_of_a_layer(tensor) or is_tiny(tensor.shape):
        return False
    return not recipe.ignores(module) and not (EXPERT.search(tensor.name) and experts_left(recipe))


def experts_left(recipe: Recipe) -> str | None:
    """Why a recipe's format leaves experts in half precision; None if it doesn't."""
    return FORMATS[recipe.format].experts(recipe.scheme)


def scheme_for(recipe: Recipe, module: str, shape_OI: tuple[int, int]) -> LayerScheme:
    """The scheme of a module that the recipe doesn't ignore; ``shape_OI`` is (outputs, inputs), also for Conv1D."""
    wanted = recipe.scheme_of(module)
    rows, columns = shape_OI
    if isinstance(wanted, Float8Scheme) and wanted.scales == "block":
        whole = rows % FP8_BLOCK == columns % FP8_BLOCK == 0
        return _or_half_precision(wanted, f"{FP8_BLOCK} doesn't divide both of {rows} x {columns}", whole)
    multiple_O, multiple_I = FORMATS[recipe.format].multiple_OI
    if rows % multiple_O or columns % multiple_I:
        need = f"{multiple_O} must divide its outputs" + (f" and {multiple_I} its inputs" if multiple_I > 1 else "")
        return LayerScheme(wanted, None, f"a weight of {rows} x {columns} can't be packed, {need}", PACKING_REMEDY)
    size = wanted.group_size if isinstance(wanted, IntScheme | MicroscalingScheme) else None
    if size is None or columns % size == 0:
        return LayerScheme(wanted, wanted)
    why = f"the group size {size} doesn't divide the width {columns}"
    match wanted:
        case IntScheme(indivisible="channel"):
            return LayerScheme(wanted, wanted.model_copy(update={"group_size": None}), why)
        case IntScheme(indivisible="keep"):
            return LayerScheme(wanted, None, why)
        case IntScheme():
            return LayerScheme(wanted, None, why, GROUP_REMEDY)
    return LayerScheme(wanted, None, why, "ignore that layer, or choose another scheme")


def _or_half_precision(wanted: Scheme, why: str, whole: bool) -> LayerScheme:
    return LayerScheme(wanted, wanted) if whole else LayerScheme(wanted, None, why)


def out_in_shape(tensor: TensorHeader, *, conv1d: bool) -> tuple[int, int]:
    """Outputs and inputs of a weight matrix; Conv1D stores them in reverse order."""
    first, second = tensor.shape
    return (second, first) if conv1d else (first, second)


def loaded_dtype(config: Mapping[str, object], tensors: Iterable[TensorHeader]) -> str:
    """The dtype that transformers loads a model in: config.json's, else that of most of its matrices."""
    declared = config.get("dtype") or config.get("torch_dtype")
    if isinstance(declared, str) and (name := declared.removeprefix("torch.")) in _DTYPES:
        return _DTYPES[name]
    matrices = [tensor.dtype for tensor in tensors if len(tensor.shape) > 1 and tensor.dtype in FLOATS]
    return max(set(matrices), key=lambda dtype: (matrices.count(dtype), dtype), default="")


def kinds_of(
    recipe: Recipe, tensors: Iterable[TensorHeader], *, conv1d: bool, dtype: str = "", model_type: str = ""
) -> LayerKinds:
    """The kinds of layers that a recipe quantizes among a checkpoint's tensors; ``conv1d`` is the family's."""
    experts = mixture = False
    schemes: dict[str, Scheme | None] = {}
    for tensor in tensors:
        mixture = mixture or ".experts." in tensor.name
        if quantizable(tensor, recipe):
            experts = experts or EXPERT.search(tensor.name) is not None
            module = tensor.name.removesuffix(".weight")
            schemes[module] = scheme_for(recipe, module, out_in_shape(tensor, conv1d=conv1d)).scheme
        elif is_matrix_of_a_layer(tensor):
            schemes[tensor.name.removesuffix(".weight")] = None
    return LayerKinds(
        experts=experts,
        conv1d=conv1d,
        mixed=len(set(schemes.values()) - {None}) > 1,
        mixture=mixture,
        dtype=dtype,
        split=bool(split_groups(schemes)),
        model_type=model_type,
    )
