"""Packs codes into int32 words and unpacks them: a dense bit stream, least significant bit first, as in both formats.

compressed-tensors packs along the input features; gptq packs ``qweight`` along the inputs and ``qzeros`` along the
outputs. With 2, 4 and 8 bits a word holds whole codes; other widths cross word boundaries (gptq's layout of 32 3-bit
codes in 3 words is the same stream).

O output features, I input features, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD, BYTE = 32, 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack codes in [0, 2^bits - 1], integer [..., N], along the last dimension: int32 [..., ceil(N * bits / 32)]."""
    *rest, count = values.shape
    if BYTE % bits == 0:
        return _pack_bytes(values, bits)
    blocks = -(-count // WORD)
    pieces = torch.nn.functional.pad(values.to(torch.int32), (0, blocks * WORD - count))
    width = bits
    # Join neighbours while two fit into a word: each step halves the elements, instead of 32 strided passes.
    while 2 * width <= WORD:
        pieces = pieces[..., 0::2] | (pieces[..., 1::2] << width)
        width *= 2
    pieces = (pieces.to(torch.int64) & 0xFFFFFFFF).view(*rest, blocks, -1)
    words = torch.zeros(*rest, blocks, bits, dtype=torch.int64, device=values.device)
    for index in range(pieces.shape[-1]):
        word, offset = divmod(index * width, WORD)
        piece = pieces[..., index]
        words[..., word] |= (piece << offset) & 0xFFFFFFFF
        if offset + width > WORD:
            words[..., word + 1] |= piece >> (WORD - offset)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.flatten(-2)[..., : -(-count * bits // WORD)].contiguous()


def _pack_bytes(values: Tensor, bits: int) -> Tensor:
    """``pack`` where a byte holds whole codes: a word's bytes come in the order of the codes."""
    codes = values.to(torch.uint8)
    if missing := -values.shape[-1] % (WORD // bits):
        codes = torch.nn.functional.pad(codes, (0, missing))
    width = bits
    while width < BYTE:
        codes = codes[..., 0::2] | (codes[..., 1::2] << width)
        width *= 2
    # Flat, for a dimension of one element may have any stride.
    return codes.contiguous().flatten().view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] * BYTE // WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``pack``: int32 [..., W] to int32 codes [..., count] in [0, 2^bits - 1]."""
    *rest, available = words.shape
    blocks = -(-count // WORD)
    padded = torch.nn.functional.pad(words, (0, blocks * bits - available)).to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(*rest, blocks, bits)
    joined = 1 << (WORD // bits).bit_length() - 1
    width = bits * joined
    pieces = []
    for index in range(WORD // joined):
        word, offset = divmod(index * width, WORD)
        piece = padded[..., word] >> offset
        if offset + width > WORD:
            piece = piece | (padded[..., word + 1] << (WORD - offset))
        pieces.append(piece.to(torch.int32))
    shifts = torch.arange(0, width, bits, dtype=torch.int32, device=words.device)
    values = (torch.stack(pieces, -1).unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1)
    return values.flatten(-3)[..., :count].contiguous()


def pack_to_int32(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack signed codes as compressed-tensors 0.20 does (``pack_to_int32``): int32 [O, ceil(I * bits / 32)]."""
    # Bytes wrap around, so that 8 bits don't need wider numbers.
    return pack(codes_OI.to(torch.int8).view(torch.uint8) + (1 << (bits - 1)), bits)


def unpack_from_int32(words_OW: Tensor, bits: int, shape_OI: tuple[int, int]) -> Tensor:
    """Inverse of ``pack_to_int32``: int8 codes in [-2^(bits-1), 2^(bits-1) - 1]."""
    return (unpack(words_OW, bits, shape_OI[1]) - (1 << (bits - 1))).to(torch.int8)


def pack_gptq(values: Tensor, bits: int, dim: int) -> Tensor:
    """Pack a matrix of codes in [0, 2^bits - 1] along ``dim`` as gptq does; 32 divides that dimension."""
    assert values.shape[dim] % WORD == 0, "the format's words hold 32 codes in a number of bits each"
    mask = (1 << bits) - 1
    return pack((values.to(torch.int32) & mask).movedim(dim, -1), bits).movedim(-1, dim).contiguous()


def unpack_gptq(words: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of ``pack_gptq``: int32 codes."""
    count = words.shape[dim] * WORD // bits
    return unpack(words.movedim(dim, -1), bits, count).movedim(-1, dim).contiguous()
