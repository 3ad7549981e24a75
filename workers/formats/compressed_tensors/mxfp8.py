"""compressed-tensors' ``mxfp8-quantized``: an E4M3 byte for each weight, and a power of two for each 32 of them.

Shapes: O output features, I input features, G groups of 32 input columns.
Specification: ``compressed_tensors.compressors.mxfp8`` (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.checkpoint.source import Header
from workers.errors import CheckpointError
from workers.numerics import microscaling
from workers.numerics.codes import Mxfp8Weight

# The library decodes only to bfloat16, whatever dtype the model computes in.
DTYPE = torch.bfloat16


def encode(weight: Mxfp8Weight) -> dict[str, Tensor]:
    """Return the stored tensors: ``weight`` float8_e4m3fn (O, I), ``weight_scale`` uint8 exponents (O, G)."""
    return {"weight": weight.values_OI.contiguous(), "weight_scale": weight.exponent_OG.contiguous()}


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of :func:`decode`'s result."""
    return Header(stored["weight"].shape, DTYPE)


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in bfloat16, as the library does.

    Raises:
        CheckpointError: the values aren't float8_e4m3fn, or their scales don't fit them.
    """
    values_OI, exponent_OG = stored["weight"], stored["weight_scale"]
    rows, columns = values_OI.shape
    if values_OI.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"weights stored as {values_OI.dtype}, expected float8_e4m3fn as config.json declares")
    expected = (rows, columns // microscaling.MX_GROUP)
    if exponent_OG.dtype != torch.uint8 or tuple(exponent_OG.shape) != expected or columns % microscaling.MX_GROUP:
        raise CheckpointError(
            f"scales {exponent_OG.dtype} {tuple(exponent_OG.shape)} for a weight of {rows} x {columns}, expected uint8 "
            f"{expected}, one for each {microscaling.MX_GROUP} inputs"
        )
    return microscaling.dequantize_mxfp8(values_OI, exponent_OG).to(DTYPE)
