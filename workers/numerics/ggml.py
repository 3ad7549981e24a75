"""ggml's blocks: their scales and codes, how they decode, and other codes on the same scales.

O output features, I input features, N blocks of a row, G groups that share a scale, R bytes of a row. Specification:
``block_q4_0`` and others, and ``dequantize_row_*``, in ggml/src/ggml-common.h and ggml-quants.c. A weight is
``codes_OI * scale_OG - minimum_OG``, in that order, in float32: the same bits as ggml's and gguf's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.numerics.grids import Integers, Nearest

# The codebook of iq4_nl and iq4_xs.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """The scales of rows: float32 [O, G]; ``minimum_OG`` None for types without."""

    scale_OG: Tensor
    minimum_OG: Tensor | None


@dataclass(frozen=True)
class Scales:
    """How whole multiples of a block's scale (float16 at byte ``at``), and of its minimum, are stored.

    ``put`` writes them, int16 [O, N, G], each from ``low`` to ``high``, into blocks.
    """

    groups: int
    low: int
    high: int
    at: int
    minimum_at: int | None
    put: Callable[[Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Units:
    """What scales and minima are whole multiples of, float32 [O, G], with the bounds of the multiples."""

    scale_OG: Tensor
    minimum_OG: Tensor | None
    low: int
    high: int


@dataclass(frozen=True)
class Layout:
    """How a type stores a block of weights.

    ``codes`` takes blocks uint8 [O, N, bytes] to integers int16 [O, N, block] between ``low`` and ``high``, and ``put``
    writes such integers into the blocks; ``grid`` reads the scales, [O, N, G]. ``table``: the codes are its indices.
    ``scales`` says how the scales of groups are stored; None: as float16 each.
    """

    block: int
    bytes: int
    low: int
    high: int
    codes: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], None]
    grid: Callable[[Tensor], Grid]
    table: tuple[int, ...] | None = None
    scales: Scales | None = None


def decode(kind: str, raw_OR: Tensor) -> Tensor:
    """The weight, float32 (O, I), of blocks uint8 (O, R)."""
    return on_grid(numbers(kind, raw_OR), grid(kind, raw_OR))


def nearest(kind: str) -> Nearest:
    """Rounds a tensor in place to the numbers that the type's codes stand for."""
    layout = LAYOUTS[kind]
    if layout.table is None:
        return Integers(layout.low, layout.high)
    values = torch.tensor(layout.table, dtype=torch.float32)
    bounds = (values[1:] + values[:-1]) / 2
    return lambda value: value.copy_(
        values.to(value.device)[torch.bucketize(value.contiguous(), bounds.to(value.device))]
    )


def numbers(kind: str, raw_OR: Tensor) -> Tensor:
    """The numbers that the codes of blocks stand for, float32 (O, I): a weight less its minimum, in steps."""
    layout, codes_OI = LAYOUTS[kind], codes(kind, raw_OR)
    if layout.table is None:
        return codes_OI.float()
    return torch.tensor(layout.table, dtype=torch.float32, device=raw_OR.device)[codes_OI.long()]


def with_numbers(kind: str, raw_OR: Tensor, numbers_OI: Tensor) -> Tensor:
    """The blocks with codes that stand for other numbers (``nearest``) on the same scales."""
    layout = LAYOUTS[kind]
    if layout.table is None:
        return with_codes(kind, raw_OR, numbers_OI.to(torch.int16))
    table = torch.tensor(layout.table, dtype=torch.float32, device=raw_OR.device)
    return with_codes(kind, raw_OR, torch.bucketize(numbers_OI.contiguous(), table).to(torch.int16))


def on_grid(codes_OI: Tensor, grid: Grid) -> Tensor:
    """The weight, float32 (O, I), of integers on a grid."""
    codes_OGg = torch.unflatten(codes_OI, 1, (grid.scale_OG.shape[1], -1)).float()
    weight_OGg = codes_OGg * grid.scale_OG[..., None]
    if grid.minimum_OG is not None:
        weight_OGg = weight_OGg - grid.minimum_OG[..., None]
    return weight_OGg.flatten(1)


def codes(kind: str, raw_OR: Tensor) -> Tensor:
    """The integers of blocks, int16 (O, I), from ``low`` to ``high``."""
    layout = LAYOUTS[kind]
    return layout.codes(_blocks(layout, raw_OR)).to(torch.int16).flatten(1)


def grid(kind: str, raw_OR: Tensor) -> Grid:
    """The scales of blocks, of each group."""
    layout = LAYOUTS[kind]
    found = layout.grid(_blocks(layout, raw_OR))
    minimum_OG = None if found.minimum_OG is None else found.minimum_OG.flatten(1)
    return Grid(found.scale_OG.flatten(1), minimum_OG)


def with_codes(kind: str, raw_OR: Tensor, codes_OI: Tensor) -> Tensor:
    """The blocks with other integers on the same scales."""
    layout = LAYOUTS[kind]
    raw_ONb = _blocks(layout, raw_OR).clone()
    layout.put(raw_ONb, torch.unflatten(codes_OI, 1, (raw_ONb.shape[1], -1)).to(torch.int16))
    return raw_ONb.flatten(1)


def units(kind: str, raw_OR: Tensor) -> Units | None:
    """What the scales of groups are multiples of; None if each is a float16 of its own."""
    layout, raw_ONb = LAYOUTS[kind], _blocks(LAYOUTS[kind], raw_OR)
    scales = layout.scales
    if scales is None:
        return None

    def spread(at: int) -> Tensor:
        return _half(raw_ONb, at).repeat_interleave(scales.groups, -1).flatten(1)

    minimum_OG = None if scales.minimum_at is None else spread(scales.minimum_at)
    return Units(spread(scales.at), minimum_OG, scales.low, scales.high)


def with_grid(kind: str, raw_OR: Tensor, grid: Grid) -> Tensor:
    """The blocks with other scales and minima, which must be ones that ``kind`` stores beside the blocks' own."""
    layout, raw_ONb = LAYOUTS[kind], _blocks(LAYOUTS[kind], raw_OR).clone()
    scales, found = layout.scales, units(kind, raw_OR)
    if scales is None or found is None:
        _put_half(raw_ONb, 0, grid.scale_OG)
        if grid.minimum_OG is not None:
            _put_half(raw_ONb, 2, -grid.minimum_OG)
        return raw_ONb.flatten(1)

    def multiples(value_OG: Tensor, unit_OG: Tensor) -> Tensor:
        whole_OG = torch.where(unit_OG == 0, 0.0, value_OG / unit_OG).round().to(torch.int16)
        return torch.unflatten(whole_OG, 1, (-1, scales.groups))

    minimum = None
    if grid.minimum_OG is not None and found.minimum_OG is not None:
        minimum = multiples(grid.minimum_OG, found.minimum_OG)
    scales.put(raw_ONb, multiples(grid.scale_OG, found.scale_OG), minimum)
    return raw_ONb.flatten(1)


def _put_half(raw: Tensor, at: int, values_ON: Tensor) -> None:
    raw[..., at : at + 2] = torch.unflatten(values_ON.to(torch.float16).contiguous().view(torch.uint8), 1, (-1, 2))


def _blocks(layout: Layout, raw_OR: Tensor) -> Tensor:
    return torch.unflatten(raw_OR, 1, (-1, layout.bytes))


def _half(raw: Tensor, at: int) -> Tensor:
    """A float16 at a byte of each block, as float32 [O, N, 1]."""
    return raw[..., at : at + 2].contiguous().view(torch.float16).float()


def _byte(values: Tensor) -> Tensor:
    return (values & 0xFF).to(torch.uint8)


def _int(raw: Tensor) -> Tensor:
    return raw.to(torch.int16)


# ------------------------------------------------------------------------------------ blocks of 32, one scale


def _nibbles(raw: Tensor, at: int) -> Tensor:
    """32 codes of 4 bits: the low halves of 16 bytes, then the high ones."""
    data = _int(raw[..., at : at + 16])
    return torch.cat([data & 15, data >> 4], -1)


def _put_nibbles(raw: Tensor, at: int, codes: Tensor) -> None:
    raw[..., at : at + 16] = _byte((codes[..., :16] & 15) | (codes[..., 16:] & 15) << 4)


def _fifth(raw: Tensor, at: int) -> Tensor:
    """The fifth bits of 32 codes, from 4 bytes."""
    shifts = torch.arange(8, device=raw.device, dtype=torch.int16)
    return (_int(raw[..., at : at + 4])[..., None] >> shifts & 1).flatten(-2)


def _put_fifth(raw: Tensor, at: int, codes: Tensor) -> None:
    shifts = torch.arange(8, device=raw.device, dtype=torch.int16)
    raw[..., at : at + 4] = _byte((torch.unflatten((codes >> 4 & 1), -1, (4, 8)) << shifts).sum(-1))


def _plain_4(at: int, middle: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]:
    def read(raw: Tensor) -> Tensor:
        return _nibbles(raw, at) - middle

    def put(raw: Tensor, codes: Tensor) -> None:
        _put_nibbles(raw, at, codes + middle)

    return read, put


def _plain_5(high: int, middle: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]:
    def read(raw: Tensor) -> Tensor:
        return (_nibbles(raw, high + 4) | _fifth(raw, high) << 4) - middle

    def put(raw: Tensor, codes: Tensor) -> None:
        _put_nibbles(raw, high + 4, codes + middle)
        _put_fifth(raw, high, codes + middle)

    return read, put


def _scale_alone(raw: Tensor) -> Grid:
    return Grid(_half(raw, 0), None)


def _scale_and_minimum(raw: Tensor) -> Grid:
    return Grid(_half(raw, 0), -_half(raw, 2))


def _read_q8_0(raw: Tensor) -> Tensor:
    return raw[..., 2:].contiguous().view(torch.int8).to(torch.int16)


def _put_q8_0(raw: Tensor, codes: Tensor) -> None:
    raw[..., 2:] = codes.to(torch.int8).view(torch.uint8)


# ------------------------------------------------------------------------------- blocks of 256, scales of scales


def _crumbs(raw: Tensor, at: int) -> Tensor:
    """256 codes of 2 bits from 64 bytes: of each 32 bytes the lowest bits, then the next."""
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    data = torch.unflatten(_int(raw[..., at : at + 64]), -1, (2, 1, 32))
    return (data >> shifts[:, None] & 3).flatten(-3)


def _put_crumbs(raw: Tensor, at: int, codes: Tensor) -> None:
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    parts = torch.unflatten((codes & 3), -1, (2, 4, 32)) << shifts[:, None]
    raw[..., at : at + 64] = _byte(parts.sum(-2).flatten(-2))


def _by_32(raw: Tensor, at: int) -> Tensor:
    """256 codes of 4 bits from 128 bytes: of each 32 bytes the low halves, then the high ones."""
    data = torch.unflatten(_int(raw[..., at : at + 128]), -1, (4, 32))
    return torch.stack([data & 15, data >> 4], -2).flatten(-3)


def _put_by_32(raw: Tensor, at: int, codes: Tensor) -> None:
    parts = torch.unflatten((codes & 15), -1, (4, 2, 32))
    raw[..., at : at + 128] = _byte((parts[..., 0, :] | parts[..., 1, :] << 4).flatten(-2))


def _planes(raw: Tensor, at: int) -> Tensor:
    """256 single bits from 32 bytes: bit 0 of all, then bit 1, ..."""
    shifts = torch.arange(8, device=raw.device, dtype=torch.int16)
    return (_int(raw[..., at : at + 32])[..., None, :] >> shifts[:, None] & 1).flatten(-2)


def _put_planes(raw: Tensor, at: int, bits: Tensor) -> None:
    shifts = torch.arange(8, device=raw.device, dtype=torch.int16)
    raw[..., at : at + 32] = _byte((torch.unflatten(bits, -1, (8, 32)) << shifts[:, None]).sum(-2))


def _grid_q2_k(raw: Tensor) -> Grid:
    scales = _int(raw[..., :16])
    return Grid(_half(raw, 80) * (scales & 15), _half(raw, 82) * (scales >> 4))


def _read_q3_k(raw: Tensor) -> Tensor:
    return _crumbs(raw, 32) + 4 * _planes(raw, 0) - 4


def _put_q3_k(raw: Tensor, codes: Tensor) -> None:
    _put_crumbs(raw, 32, codes + 4)
    _put_planes(raw, 0, codes + 4 >> 2 & 1)


def _grid_q3_k(raw: Tensor) -> Grid:
    packed = _int(raw[..., 96:108])
    low = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    high = (packed[..., None, 8:] >> shifts[:, None] & 3).flatten(-2)
    return Grid(_half(raw, 108) * ((low | high << 4) - 32), None)


def _grid_q4_k(raw: Tensor) -> Grid:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    packed = _int(raw[..., 4:16])
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], -1)
    minima = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], -1)
    return Grid(_half(raw, 0) * scales, _half(raw, 2) * minima)


def _put_scales_q2_k(raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    assert minima is not None
    raw[..., :16] = _byte(scales | minima << 4)


def _put_scales_q3_k(raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    whole = scales + 32
    raw[..., 96:104] = _byte((whole[..., :8] & 15) | (whole[..., 8:] & 15) << 4)
    raw[..., 104:108] = _byte((torch.unflatten(whole >> 4, -1, (4, 4)) << shifts[:, None]).sum(-2))


def _put_scales_q4_k(raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    assert minima is not None
    raw[..., 4:8] = _byte((scales[..., :4] & 63) | (scales[..., 4:] >> 4) << 6)
    raw[..., 8:12] = _byte((minima[..., :4] & 63) | (minima[..., 4:] >> 4) << 6)
    raw[..., 12:16] = _byte((scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4)


def _put_scales_q6_k(raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    raw[..., 192:208] = scales.to(torch.int8).view(torch.uint8)


def _read_q5_k(raw: Tensor) -> Tensor:
    return _by_32(raw, 48) | _planes(raw, 16) << 4


def _put_q5_k(raw: Tensor, codes: Tensor) -> None:
    _put_by_32(raw, 48, codes)
    _put_planes(raw, 16, codes >> 4 & 1)


def _read_q6_k(raw: Tensor) -> Tensor:
    low = torch.unflatten(_int(raw[..., :128]), -1, (2, 64))
    low = torch.cat([low & 15, low >> 4], -1)  # [.., 2, 128]
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    high = (torch.unflatten(_int(raw[..., 128:192]), -1, (2, 1, 32)) >> shifts[:, None] & 3).flatten(-2)
    return (low | high << 4).flatten(-2) - 32


def _put_q6_k(raw: Tensor, codes: Tensor) -> None:
    parts = torch.unflatten((codes + 32), -1, (2, 128))
    low, high = parts & 15, torch.unflatten((parts >> 4), -1, (4, 32))
    raw[..., :128] = _byte((low[..., :64] | low[..., 64:] << 4).flatten(-2))
    shifts = torch.tensor([0, 2, 4, 6], device=raw.device, dtype=torch.int16)
    raw[..., 128:192] = _byte((high << shifts[:, None]).sum(-2).flatten(-2))


def _grid_q6_k(raw: Tensor) -> Grid:
    return Grid(_half(raw, 208) * raw[..., 192:208].contiguous().view(torch.int8), None)


def _grid_iq4_xs(raw: Tensor) -> Grid:
    high = _int(raw[..., 2:3]) | _int(raw[..., 3:4]) << 8
    places = torch.arange(8, device=raw.device, dtype=torch.int16)
    low = (_int(raw[..., 4:8])[..., None] >> torch.tensor([0, 4], device=raw.device, dtype=torch.int16) & 15).flatten(
        -2
    )
    scales = low | ((high.int() & 0xFFFF) >> 2 * places & 3).to(torch.int16) << 4
    return Grid(_half(raw, 0) * (scales - 32), None)


def _read_iq4_xs(raw: Tensor) -> Tensor:
    data = torch.unflatten(_int(raw[..., 8:]), -1, (8, 16))
    return torch.cat([data & 15, data >> 4], -1).flatten(-2)


def _put_iq4_xs(raw: Tensor, codes: Tensor) -> None:
    parts = torch.unflatten(codes, -1, (8, 32))
    raw[..., 8:] = _byte((parts[..., :16] | parts[..., 16:] << 4).flatten(-2))


def _put_scales_iq4_xs(raw: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    whole = (scales + 32).int()
    places = torch.arange(8, device=raw.device, dtype=torch.int32)
    high = (whole >> 4 << 2 * places).sum(-1)
    raw[..., 2], raw[..., 3] = _byte(high), _byte(high >> 8)
    raw[..., 4:8] = _byte((whole[..., ::2] & 15) | (whole[..., 1::2] & 15) << 4)


_IQ4_XS = Scales(8, -32, 31, 0, None, _put_scales_iq4_xs)
_Q2_K, _Q3_K = Scales(16, 0, 15, 80, 82, _put_scales_q2_k), Scales(16, -32, 31, 108, None, _put_scales_q3_k)
_Q4_K, _Q6_K = Scales(8, 0, 63, 0, 2, _put_scales_q4_k), Scales(16, -128, 127, 208, None, _put_scales_q6_k)


def _put_q2_k(raw: Tensor, codes: Tensor) -> None:
    _put_crumbs(raw, 16, codes)


def _put_q4_k(raw: Tensor, codes: Tensor) -> None:
    _put_by_32(raw, 16, codes)


LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout(32, 34, -128, 127, _read_q8_0, _put_q8_0, _scale_alone),
    "q4_0": Layout(32, 18, -8, 7, *_plain_4(2, 8), _scale_alone),
    "q4_1": Layout(32, 20, 0, 15, *_plain_4(4, 0), _scale_and_minimum),
    "q5_0": Layout(32, 22, -16, 15, *_plain_5(2, 16), _scale_alone),
    "q5_1": Layout(32, 24, 0, 31, *_plain_5(4, 0), _scale_and_minimum),
    "iq4_nl": Layout(32, 18, 0, 15, *_plain_4(2, 0), _scale_alone, IQ4),
    "q2_k": Layout(256, 84, 0, 3, lambda raw: _crumbs(raw, 16), _put_q2_k, _grid_q2_k, None, _Q2_K),
    "q3_k": Layout(256, 110, -4, 3, _read_q3_k, _put_q3_k, _grid_q3_k, None, _Q3_K),
    "q4_k": Layout(256, 144, 0, 15, lambda raw: _by_32(raw, 16), _put_q4_k, _grid_q4_k, None, _Q4_K),
    "q5_k": Layout(256, 176, 0, 31, _read_q5_k, _put_q5_k, _grid_q4_k, None, _Q4_K),
    "q6_k": Layout(256, 210, -32, 31, _read_q6_k, _put_q6_k, _grid_q6_k, None, _Q6_K),
    "iq4_xs": Layout(256, 136, 0, 15, _read_iq4_xs, _put_iq4_xs, _grid_iq4_xs, IQ4, _IQ4_XS),
}
