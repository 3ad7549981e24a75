"""A quantized weight, as produced by a method and stored by a format: codes and scales, and how they are decoded.

O output features, I input features, G groups of input columns (1 for a scale per output channel).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.numerics import fp8, microscaling, rounding


@dataclass(frozen=True)
class IntWeight:
    """``weight_OI = (codes_OI - zero_OG) * scale_OG``.

    ``codes_OI`` int8 in [-2^(bits-1), 2^(bits-1) - 1]; ``scale_OG`` in its stored dtype; ``zero_OG`` int8 in the range
    of the codes, or float32 for formats that store biases, None for symmetric.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    bits: int
    group_size: int | None

    def dequantize(self) -> Tensor:
        """The weight, float32 (O, I)."""
        return rounding.dequantize(self.codes_OI, self.scale_OG, self.zero_OG)


@dataclass(frozen=True)
class Float8Weight:
    """``weight_OI = values_OI * scale``.

    ``values_OI`` float8_e4m3fn; ``scale`` (1,) for the tensor, (O, 1) for each output channel, or
    (ceil(O / 128), ceil(I / 128)) for each block where ``blocks``; ``input_scale`` (1,) for static activations.
    """

    values_OI: Tensor
    scale: Tensor
    blocks: bool
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, float32 (O, I)."""
        return fp8.dequantize(self.values_OI, self.scale, blocks=self.blocks)


@dataclass(frozen=True)
class Float4Weight:
    """E2M1 codes: ``weight_OI = e2m1(codes_OI) * scale_OG`` (nvfp4: ``* scale_OG / global_scale``).

    ``codes_OI`` uint8 in [0, 15], the sign in bit 3. mxfp4: ``scale_OG`` uint8, exponents with a bias of 127, groups of
    32. nvfp4: ``scale_OG`` float8_e4m3fn, groups of 16, and ``global_scale`` float32 (1,); ``input_global_scale``
    float32 (1,), if inputs are rounded too.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    global_scale: Tensor | None
    input_global_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, float32 (O, I)."""
        return microscaling.dequantize(self.codes_OI, self.scale_OG, self.global_scale)


@dataclass(frozen=True)
class Mxfp8Weight:
    """``weight_OI = values_OI * 2^(exponent_OG - 127)``: float8_e4m3fn, and uint8 for groups of 32."""

    values_OI: Tensor
    exponent_OG: Tensor

    def dequantize(self) -> Tensor:
        """The weight, float32 (O, I)."""
        return microscaling.dequantize_mxfp8(self.values_OI, self.exponent_OG)


CodedWeight = IntWeight | Float8Weight | Float4Weight | Mxfp8Weight
