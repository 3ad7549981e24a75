"""compressed-tensors' ``pack-quantized``: integers of 2 to 8 bits in one bit stream, activations unchanged.

Zero points are packed like the codes, along the outputs.

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

ZEROS = "weight_zero_point"
NAMES = ("weight_packed", "weight_scale", "weight_shape")


def encode(weight: IntWeight) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight_packed`` int32 (O, ceil(I * bits / 32)); ``weight_scale`` (O, G) in its given dtype; ``weight_shape``
    int64 (2,); ``weight_zero_point`` int32 (ceil(O * bits / 32), G) unless symmetric.
    """
    zeros = {} if weight.zero_OG is None else {ZEROS: pack_to_int32(weight.zero_OG.t(), weight.bits).t().contiguous()}
    return {
        "weight_packed": pack_to_int32(weight.codes_OI, weight.bits),
        "weight_scale": weight.scale_OG.contiguous(),
        "weight_shape": torch.tensor(weight.codes_OI.shape),
        **zeros,
    }


def header(stored: Mapping[str, Header], read: Callable[[str], Tensor]) -> Header:
    """Return shape and dtype of :func:`decode`'s result; ``read`` reads a stored tensor by its name."""
    rows, columns = read("weight_shape").tolist()
    return Header((rows, columns), stored["weight_scale"].dtype)


def decode(stored: Mapping[str, Tensor], bits: int, group_size: int | None, *, symmetric: bool = True) -> Tensor:
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
    codes_OGg = codes_OI.view(rows, scale_OG.shape[1], -1)
    if not symmetric:
        codes_OGg -= _zeros(stored, bits).to(scale_OG.dtype).unsqueeze(-1)
    return (codes_OGg * scale_OG[:, :, None]).view(rows, columns)


def _zeros(stored: Mapping[str, Tensor], bits: int) -> Tensor:
    """The zero points, int8 (O, G).

    Raises:
        CheckpointError: there are more or fewer than scales.
    """
    words, (rows, groups) = stored[ZEROS], stored["weight_scale"].shape
    expected = (-(-rows * bits // 32), groups)
    if tuple(words.shape) != expected:
        raise CheckpointError(
            f"zero points of shape {tuple(words.shape)}, expected {expected} for {rows} outputs in {groups} groups"
        )
    return unpack_from_int32(words.t(), bits, (groups, rows)).t()


def codes(stored: Mapping[str, Tensor], bits: int, *, symmetric: bool = True) -> IntWeight:
    """The codes of one module.

    Raises:
        CheckpointError: the number of words, or of zero points, doesn't match.
    """
    scale_OG = stored["weight_scale"]
    rows, columns = (int(size) for size in stored["weight_shape"])
    check_words(stored["weight_packed"].shape[1], columns, bits)
    codes_OI = unpack_from_int32(stored["weight_packed"], bits, (rows, columns))
    groups = scale_OG.shape[1]
    zero_OG = None if symmetric else _zeros(stored, bits).contiguous()
    return IntWeight(codes_OI, scale_OG, zero_OG, bits, None if groups == 1 else columns // groups)


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
