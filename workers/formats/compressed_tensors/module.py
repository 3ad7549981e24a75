"""The compressed-tensors format, as llm-compressor and vLLM use it: writes and reads the stored form of each module.

The forms are in ``packed``, ``plain`` and ``float4``, config.json is in ``config``. Specification:
``compressed_tensors`` 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import CheckpointError
from workers.formats.compressed_tensors import float4 as ct_float4
from workers.formats.compressed_tensors import mxfp8 as ct_mxfp8
from workers.formats.compressed_tensors import packed as ct_packed
from workers.formats.compressed_tensors import plain as ct_plain
from workers.formats.compressed_tensors.config import EXPERT as EXPERT
from workers.formats.compressed_tensors.config import MXFP4, MXFP8, NVFP4, PACKED, Declared, form_of
from workers.formats.compressed_tensors.config import Declarations as Declarations
from workers.formats.compressed_tensors.config import has_cache_scales as has_cache_scales
from workers.formats.compressed_tensors.config import quantization_config as quantization_config
from workers.formats.compressed_tensors.config import some as some
from workers.formats.compressed_tensors.packed import check_words as check_words
from workers.formats.decoder import Decoder
from workers.numerics import activations
from workers.numerics.codes import CodedWeight, Float4Weight, IntWeight, Mxfp8Weight
from workers.spec.schemes import LinearScheme

ANCHORS = ("weight_packed", "weight_scale")
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
)
SCALES_OF_INPUTS = {"static": "input_scale", "nvfp4": "input_global_scale"}
GROUP_SIZES = {MXFP4: 32, NVFP4: 16}
NAMES = {PACKED: ct_packed.NAMES, MXFP4: ct_float4.NAMES, NVFP4: (*ct_float4.NAMES, ct_float4.GLOBAL)}


def encode(weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module, in the form of ``scheme``."""
    if isinstance(weight, Float4Weight):
        return ct_float4.encode(weight)
    if isinstance(weight, Mxfp8Weight):
        return ct_mxfp8.encode(weight)
    if isinstance(weight, IntWeight) and form_of(scheme) == PACKED:
        return ct_packed.encode(weight)
    return ct_plain.encode(weight)


def is_packed(scheme: LinearScheme) -> bool:
    """Whether a module of this scheme is stored as ``weight_packed``, without a ``weight``."""
    return form_of(scheme) in NAMES


def header(stored: Mapping[str, Header], read: Callable[[str], Tensor], declared: Declared) -> Header:
    """Return shape and dtype of :func:`decode`'s result; ``read`` reads a stored tensor by its name.

    Raises:
        CheckpointError: tensors of the declared form are missing.
    """
    static = [SCALES_OF_INPUTS[declared.activations]] if declared.activations in SCALES_OF_INPUTS else []
    zeros = [] if declared.symmetric else [ct_packed.ZEROS]
    missing = [name for name in (*NAMES.get(declared.form, ct_plain.NAMES), *static, *zeros) if name not in stored]
    if missing:
        raise CheckpointError(
            f"quantized, but its {', '.join(missing)} isn't there, as {declared.form!r} has it; make it anew"
        )
    if declared.form == PACKED:
        return ct_packed.header(stored, read)
    if declared.form == MXFP8:
        return ct_mxfp8.header(stored)
    return ct_float4.header(stored) if declared.form in GROUP_SIZES else ct_plain.header(stored)


def decode(stored: Mapping[str, Tensor], declared: Declared) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in the dtype that the library decodes it to.

    Raises:
        CheckpointError: the stored tensors don't match the declaration.
    """
    if declared.form == PACKED:
        return ct_packed.decode(stored, declared.bits, declared.group_size, symmetric=declared.symmetric)
    if declared.form == MXFP8:
        return ct_mxfp8.decode(stored)
    if declared.form in GROUP_SIZES:
        return ct_float4.decode(stored, GROUP_SIZES[declared.form])
    return ct_plain.decode(stored, declared.kind)


def codes(stored: Mapping[str, Tensor], declared: Declared) -> CodedWeight | None:
    """The codes of one module, its scales in their stored dtypes; None for groups of byte-wide weights."""
    if declared.form == PACKED:
        return ct_packed.codes(stored, declared.bits, symmetric=declared.symmetric)
    if declared.form == MXFP8:
        return Mxfp8Weight(stored["weight"], stored["weight_scale"])
    return ct_float4.codes(stored) if declared.form in GROUP_SIZES else ct_plain.codes(stored, declared.bits)


def input_rounding(declared: Declared, stored: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The rounding that transformers 5.23 applies to a module's input, on a CPU as on a GPU; None if none.

    ``stored`` has the scale of the module's input, if there is one.
    """
    match declared.activations:
        case "int8":
            return activations.round_int8_token
        case "dynamic":
            return activations.round_fp8_token
        case "static":
            scale = stored["input_scale"]
            return lambda x: activations.round_fp8_static(x, scale.to(x.device))
        case "mxfp4":
            return activations.round_mxfp4
        case "mxfp8":
            return activations.round_mxfp8
        case "nvfp4":
            divisor = stored["input_global_scale"]
            return lambda x: activations.round_nvfp4(x, divisor.to(x.device))
        case _:
            return None


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``.

    Raises:
        UnsupportedRecipe: its keys and values are rounded in a way that isn't known.
    """
    declared_of = Declarations(config).of
    return Decoder(
        anchors=ANCHORS,
        suffixes=SUFFIXES,
        cache_scales=has_cache_scales(config),
        activation_scales=tuple(SCALES_OF_INPUTS.values()),
        required=(),  # it depends on the module's group
        header=lambda module, headers, read: header(headers, read, declared_of(module)),
        decode=lambda module, stored: decode(stored, declared_of(module)),
        facts=("weight_shape",),
        codes=lambda module, stored: codes(stored, declared_of(module)),
        rounding=lambda module, stored, _: input_rounding(declared_of(module), stored),
    )
