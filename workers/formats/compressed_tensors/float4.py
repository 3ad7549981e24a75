"""compressed-tensors' ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``: two E2M1 codes a byte.

Shapes: O output features, I input features, G groups of 32 (mxfp4) or 16 (nvfp4) input columns.
Specification: ``compressed_tensors.compressors.nvfp4`` and ``mxfp4`` (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.checkpoint.source import Header
from workers.errors import CheckpointError
from workers.numerics import microscaling
from workers.numerics.codes import Float4Weight

NAMES = ("weight_packed", "weight_scale")
GLOBAL, INPUTS = "weight_global_scale", "input_global_scale"
# The library decodes only to bfloat16, whatever dtype the model computes in.
DTYPE = torch.bfloat16


def encode(weight: Float4Weight) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight_packed`` uint8 (O, I / 2), the first code in the low half; ``weight_scale`` (O, G), uint8 exponents for
    mxfp4, float8_e4m3fn for nvfp4; for nvfp4 ``weight_global_scale`` float32 (1,), which divides, and
    ``input_global_scale`` float32 (1,) if inputs are rounded.
    """
    inputs = {} if weight.input_global_scale is None else {INPUTS: weight.input_global_scale}
    stored = {"weight_packed": microscaling.pack(weight.codes_OI), "weight_scale": weight.scale_OG.contiguous()}
    return stored if weight.global_scale is None else {**stored, GLOBAL: weight.global_scale, **inputs}


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of :func:`decode`'s result."""
    rows, pairs = stored["weight_packed"].shape
    return Header((rows, 2 * pairs), DTYPE)


def decode(stored: Mapping[str, Tensor], group_size: int) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in bfloat16, as the library does.

    Raises:
        CheckpointError: the scales' number or dtype doesn't match ``group_size``.
    """
    codes_OI, scale_OG = microscaling.unpack(stored["weight_packed"]), stored["weight_scale"]
    nvfp4 = group_size == microscaling.NVFP4_GROUP
    expected = (codes_OI.shape[0], codes_OI.shape[1] // group_size)
    if tuple(scale_OG.shape) != expected or codes_OI.shape[1] % group_size:
        raise CheckpointError(
            f"{tuple(codes_OI.shape)} codes with scales of shape {tuple(scale_OG.shape)}, expected {expected} for the "
            f"groups of {group_size} that config.json declares"
        )
    dtype = torch.float8_e4m3fn if nvfp4 else torch.uint8
    if scale_OG.dtype != dtype:
        raise CheckpointError(f"scales stored as {scale_OG.dtype}, expected {dtype} as config.json declares")
    return microscaling.dequantize(codes_OI, scale_OG, stored[GLOBAL] if nvfp4 else None).to(DTYPE)


def codes(stored: Mapping[str, Tensor]) -> Float4Weight:
    """The codes of one module, its scales as they are stored."""
    codes_OI = microscaling.unpack(stored["weight_packed"])
    return Float4Weight(codes_OI, stored["weight_scale"], stored.get(GLOBAL), stored.get(INPUTS))
