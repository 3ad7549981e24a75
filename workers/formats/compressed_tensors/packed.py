"""compressed-tensors' ``pack-quantized``: symmetric integers of 2 to 8 bits in one bit stream, activations unchanged.

Shapes: O output features, I input features, G groups of input columns (1 for a scale per output channel).
Specification: ``compressed_tensors.compressors.pack_quantized`` (0.20).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from workers.checkpoint.source import Header
from workers.errors import CheckpointError
from workers.numerics.codes import IntWeight
from workers.numerics.packing import pack_to_int32, unpack_from_int32

NAMES = ("weight_packed", "weight_scale", "weight_shape")


def encode(weight: IntWeight) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight_packed`` int32 (O, ceil(I * bits / 32)); ``weight_scale`` (O, G) in its given dtype; ``weight_shape``
    int64 (2,).
    """
    assert weight.zero_OG is None, "formats.check_holds refuses asymmetric schemes for this format"
    return {
        "weight_packed": pack_to_int32(weight.codes_OI, weight.bits),
        "weight_scale": weight.scale_OG.contiguous(),
        "weight_shape": torch.tensor(weight.codes_OI.shape),
    }


def header(stored: Mapping[str, Header], read: Callable[[str], Tensor]) -> Header:
    """Return shape and dtype of :func:`decode`'s result; ``read`` reads a stored tensor by its name."""
    rows, columns = read("weight_shape").tolist()
    return Header((rows, columns), stored["weight_scale"].dtype)


def decode(stored: Mapping[str, Tensor], bits: int, group_size: int | None) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in the dtype of the scales, as the library does.

    Raises:
        CheckpointError: the number of words doesn't match ``bits``, or the scales don't match ``group_size``.
    """
    scale_OG = stored["weight_scale"]
    rows, columns = (int(size) for size in stored["weight_shape"])
    check_words(stored["weight_packed"].shape[1], columns, bits)
    expected = (rows, columns // (group_size or columns))
    if tuple(scale_OG.shape) != expected:
        size = f"groups of {group_size}" if group_size else "one scale for each output"
        raise CheckpointError(
            f"scales of shape {tuple(scale_OG.shape)}, expected {expected} for the {size} that config.json declares"
        )
    codes_OI = unpack_from_int32(stored["weight_packed"], bits, (rows, columns)).to(scale_OG.dtype)
    return (codes_OI.view(rows, scale_OG.shape[1], -1) * scale_OG[:, :, None]).view(rows, columns)


def codes(stored: Mapping[str, Tensor], bits: int) -> IntWeight:
    """The codes of one module."""
    scale_OG = stored["weight_scale"]
    rows, columns = (int(size) for size in stored["weight_shape"])
    check_words(stored["weight_packed"].shape[1], columns, bits)
    codes_OI = unpack_from_int32(stored["weight_packed"], bits, (rows, columns))
    groups = scale_OG.shape[1]
    return IntWeight(codes_OI, scale_OG, None, bits, None if groups == 1 else columns // groups)


def check_words(words: int, codes: int, bits: int) -> None:
    """Check the number of stored words against the bit width.

    Raises:
        CheckpointError: names both.
    """
    expected = -(-codes * bits // 32)
    if words != expected:
        raise CheckpointError(
            f"{codes} codes stored in {words} words, expected {expected} for the {bits} bits that config.json declares"
        )
