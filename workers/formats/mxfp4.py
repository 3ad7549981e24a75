"""Reads transformers' MXFP4 format (``quant_method: mxfp4``), as in gpt-oss: all experts of a layer in one tensor.

E experts, O output features, I input features, G groups of 32 input columns (32 * G = I), 16 bytes of two codes each.
Specification: ``transformers.integrations.mxfp4.convert_moe_packed_tensors`` (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats.decoder import Decoder
from workers.numerics import microscaling
from workers.spec.low_bit import BLOCKS, SCALES, fused_shape

# Holds every product of a code and a power of two exactly.
DTYPE = torch.bfloat16


def decode(blocks_EOGb: Tensor, scales_EOG: Tensor) -> Tensor:
    """Decode the experts of a layer, bfloat16 (E, I, O): transposed, as their module multiplies.

    ``blocks_EOGb`` uint8 (E, O, G, 16), the first code in the low half; ``scales_EOG`` uint8 exponents, bias 127. Works
    expert by expert, so that float32 values exist for one expert alone.
    """
    experts, rows, groups, _ = blocks_EOGb.shape
    weight_EIO = torch.empty(experts, groups * microscaling.MX_GROUP, rows, dtype=DTYPE)
    for expert in range(experts):
        codes_OI = microscaling.unpack(blocks_EOGb[expert].flatten(-2))
        weight_EIO[expert] = microscaling.dequantize(codes_OI, scales_EOG[expert], None).T
    return weight_EIO


class Fused:
    """A checkpoint (a ``source.TensorSource``) with one decoded tensor for each pair of blocks and scales.

    Raises:
        CheckpointError: blocks are without scales, or of other shapes or dtypes than the format has.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.headers: dict[str, Header] = {}
        for key, header in source.headers.items():
            name = key.removesuffix(BLOCKS)
            if key.endswith(SCALES) and f"{key.removesuffix(SCALES)}{BLOCKS}" in source.headers:
                continue
            if name == key:
                self.headers[key] = header
                continue
            scales = source.headers.get(f"{name}{SCALES}")
            shape = fused_shape(header.shape, scales.shape if scales else None)
            if shape is None or header.dtype != torch.uint8 or (scales and scales.dtype != torch.uint8):
                raise CheckpointError(
                    f"{key}: {header.dtype} {header.shape} with the scales {scales}, expected uint8 blocks (E, O, G, "
                    "16) and uint8 scales (E, O, G); name the publisher's own checkpoint"
                )
            self.headers[name] = Header(shape, DTYPE)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous."""
        stored = self.stored(name)
        return decode(stored[f"{name}{BLOCKS}"], stored[f"{name}{SCALES}"]) if stored else self._source.read(name)

    def stored_name(self, name: str) -> str:
        """The key of the file that holds a tensor which isn't decoded."""
        return name

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors that one is decoded from, by their keys; none if it's stored as it is."""
        if name in self._source.headers or name not in self.headers:
            return {}
        return {key: self._source.read(key) for key in (f"{name}{BLOCKS}", f"{name}{SCALES}")}


def has_blocks(source: Source) -> bool:
    """Whether a checkpoint has experts in blocks with scales."""
    return any(
        key.endswith(BLOCKS) and f"{key.removesuffix(BLOCKS)}{SCALES}" in source.headers for key in source.headers
    )


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``: its view alone decodes."""

    def never(module: str, *_: object) -> Any:
        raise UnsupportedRecipe(f"{module}: format mxfp4 quantizes experts in one tensor alone")

    return Decoder(anchors=(), suffixes=(), required=(), header=never, decode=never, view=Fused(source))
