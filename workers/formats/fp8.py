"""transformers' FineGrainedFP8 format (``quant_method: fp8``), as in DeepSeek-V3: one scale per 128 x 128 block.

O output features, I input features, P and Q blocks of them.
Specification: ``transformers.integrations.finegrained_fp8`` (5.23); vLLM reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats.compressed_tensors.config import EXPERT, some
from workers.formats.decoder import NO_NAMES, Decoder
from workers.machine import fp8_kernels
from workers.numerics import activations, fp8
from workers.numerics.codes import CodedWeight, Float8Weight
from workers.spec.formats import FP8, others_that_hold
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import misfit
from workers.spec.schemes import Float8Scheme, LinearScheme

ANCHORS = ("weight_scale_inv",)
SUFFIXES = ("weight", "weight_scale_inv")
CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": FP8.name,
    "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}
# Readable values of each setting, and the default of a config.json without it.
READABLE: dict[str, tuple[Any, Any]] = {
    "activation_scheme": ("dynamic", "dynamic"),
    "weight_block_size": ([fp8.BLOCK, fp8.BLOCK], [fp8.BLOCK, fp8.BLOCK]),
    "scale_fmt": ("float", "float"),
    "expert_dtype": ("fp8", "fp8"),
}


def encode(weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight`` float8_e4m3fn (O, I); ``weight_scale_inv`` float32 (P, Q), which multiplies despite its name.

    Raises:
        UnsupportedRecipe: 128 doesn't divide O and I.
    """
    assert isinstance(weight, Float8Weight), "formats.check_holds refuses other schemes for this format"
    assert weight.blocks, "formats.check_holds refuses scales other than for blocks in this format"
    check_sides(weight.values_OI.shape)
    return {"weight": weight.values_OI.contiguous(), "weight_scale_inv": weight.scale.float().contiguous()}


def check_sides(shape_OI: Iterable[int]) -> None:
    """Refuse a weight that isn't made of whole blocks.

    When transformers 5.23 decodes, it silently takes 5 rows of scales for 576 rows of weights as blocks of 115.2 rows,
    and 2 for 160 as blocks of 80; its kernels use blocks of 128, as DeepSeek does.

    Raises:
        UnsupportedRecipe: 128 doesn't divide both sides.
    """
    rows, columns = shape_OI
    if rows % fp8.BLOCK or columns % fp8.BLOCK:
        raise UnsupportedRecipe(
            f"fp8: a weight of {rows} x {columns} isn't made of whole blocks, {fp8.BLOCK} must divide both; ignore "
            f"that layer, or choose scales: channel in {others_that_hold(FP8.name, Float8Scheme())}"
        )


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of :func:`decode`'s result."""
    return Header(stored["weight"].shape, torch.float32)


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), float32; a side may end in a partial block.

    Raises:
        CheckpointError: the values aren't float8_e4m3fn, or the scales don't fit them.
    """
    values_OI, scale_PQ = stored["weight"], stored["weight_scale_inv"]
    if values_OI.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"weights stored as {values_OI.dtype}, expected float8_e4m3fn as config.json declares")
    expected = tuple(-(-side // fp8.BLOCK) for side in values_OI.shape)
    if tuple(scale_PQ.shape) != expected or not scale_PQ.dtype.is_floating_point:
        raise CheckpointError(
            f"weight_scale_inv {scale_PQ.dtype} {tuple(scale_PQ.shape)} for a weight of {tuple(values_OI.shape)}, "
            f"expected float32 {expected}"
        )
    return fp8.dequantize(values_OI, scale_PQ, blocks=True)


def codes(stored: Mapping[str, Tensor]) -> Float8Weight:
    """The codes of one module, and its scales in their stored dtype."""
    return Float8Weight(stored["weight"], stored["weight_scale_inv"], blocks=True)


def check_declared(config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` that can't be decoded.

    Raises:
        UnsupportedRecipe: other blocks, static activations, or scales that are powers of two.
    """
    for name, (readable, default) in READABLE.items():
        if config.get(name, default) != readable:
            raise UnsupportedRecipe(f"fp8: {name} {config[name]!r} can't be decoded; only {readable!r} is known")


def input_rounding(device: str) -> Callable[[Tensor], Tensor] | None:
    """The rounding that transformers 5.23 applies to every quantized layer's input, experts included; None if none.

    Only its kernels round (on a GPU that they run on, or an XPU); without them, the weights are decoded on loading.
    """
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    decoded = device == "cpu" or (device == "cuda" and fp8_kernels.lacking(capability) != "")
    return None if decoded else activations.round_fp8_group128


def quantization_config(
    schemes: Mapping[str, LinearScheme],
    unquantized: Iterable[str],
    conv1d: Iterable[str] = (),
    runtimes: Iterable[str] = (),
    in_model: Mapping[str, str] = NO_NAMES,
    speculative: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    ``schemes`` is each quantized module's scheme; ``unquantized`` are the other Linear modules (where a module and its
    checkpoint key differ in name, both names); ``conv1d`` are those of ``schemes`` that are transformers' Conv1D.

    Raises:
        UnsupportedRecipe: there are Conv1D modules, or only some of a layer's experts are quantized.
    """
    conv1d, unquantized = sorted(conv1d), sorted(set(unquantized))
    first = next(iter(schemes.values()))
    why = misfit(FP8.name, first, LayerKinds(conv1d=True), runtimes) if conv1d else None
    if why:
        raise UnsupportedRecipe(f"fp8: {some(conv1d)} {why}")
    # transformers replaces a layer's experts as one module, which must be listed under its own name.
    unquantized_by_layer = {_experts_of(name): name for name in unquantized if EXPERT.search(name)}
    uneven = sorted(
        unquantized_by_layer[_experts_of(name)]
        for name in schemes
        if EXPERT.search(name) and _experts_of(name) in unquantized_by_layer
    )
    if uneven:
        raise UnsupportedRecipe(
            f"fp8: the experts {some(uneven)} are left as they are, but others of their layer aren't; transformers "
            "loads them together; ignore all of them ('*.experts.*') or none"
        )
    return {**CONFIG, "modules_to_not_convert": sorted({*unquantized, *unquantized_by_layer})}


def _experts_of(module: str) -> str:
    return f"{module.rpartition('.experts.')[0]}.experts"


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``.

    Raises:
        UnsupportedRecipe: see ``check_declared``.
    """
    check_declared(config)
    return Decoder(
        anchors=ANCHORS,
        suffixes=SUFFIXES,
        required=SUFFIXES,
        header=lambda module, headers, read: header(headers),
        decode=lambda module, stored: decode(stored),
        rounding=lambda module, stored, device: input_rounding(device),
        codes=lambda module, stored: codes(stored),
    )
