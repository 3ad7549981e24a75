"""compressed-tensors' ``int-quantized``, ``float-quantized`` and ``naive-quantized``: one byte per weight.

Shapes: O output features, I input features, G groups of input columns (1 for a scale per output channel).
Specification: ``compressed_tensors.compressors.naive_quantized`` (0.20). int-quantized is W8A8, float-quantized is FP8
with rounded activations, naive-quantized has neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.checkpoint.source import Header
from workers.errors import CheckpointError
from workers.numerics.codes import Float8Weight, IntWeight

NAMES = ("weight", "weight_scale")
DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}


def encode(weight: IntWeight | Float8Weight) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight`` int8 or float8_e4m3fn (O, I); ``weight_scale`` (O, 1), or (1,) for the whole tensor, in its given dtype,
    which must be the model's, or readers round it; ``input_scale`` (1,) in the same dtype, for static activations.
    """
    if isinstance(weight, IntWeight):
        assert weight.zero_OG is None, "formats.check_holds refuses asymmetric schemes for this format"
        return {"weight": weight.codes_OI.contiguous(), "weight_scale": weight.scale_OG.contiguous()}
    assert not weight.blocks, "formats.check_holds refuses scales for blocks in this format"
    stored = {"weight": weight.values_OI.contiguous(), "weight_scale": weight.scale.contiguous()}
    if weight.input_scale is not None:
        stored["input_scale"] = weight.input_scale.to(weight.scale.dtype)
    return stored


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of :func:`decode`'s result."""
    return Header(stored["weight"].shape, stored["weight_scale"].dtype)


def decode(stored: Mapping[str, Tensor], kind: str) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in the dtype of the scales, as the library does.

    Raises:
        CheckpointError: the values' type isn't ``kind`` (int or float), or the scales don't fit them.
    """
    values_OI, scale = stored["weight"], stored["weight_scale"]
    rows, columns = values_OI.shape
    if values_OI.dtype != DTYPES[kind]:
        raise CheckpointError(f"weights stored as {values_OI.dtype}, expected {DTYPES[kind]} as config.json declares")
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    if scale.dim() != 2 or scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        raise CheckpointError(
            f"scales of shape {tuple(scale.shape)} for a weight of {rows} x {columns}, expected one or some a row"
        )
    groups = values_OI.to(scale.dtype).view(rows, scale.shape[1], -1)
    return (groups * scale[:, :, None]).view(rows, columns)


def codes(stored: Mapping[str, Tensor], bits: int) -> IntWeight | Float8Weight | None:
    """The codes of one module, its scales in their stored dtype; None for scales by group."""
    values_OI, scale = stored["weight"], stored["weight_scale"]
    if scale.numel() not in (1, len(values_OI)):
        return None
    if values_OI.dtype == torch.int8:
        return IntWeight(values_OI, scale, None, bits, None) if scale.dim() == 2 else None
    return Float8Weight(values_OI, scale, blocks=False, input_scale=stored.get("input_scale"))
