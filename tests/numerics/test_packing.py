"""Packing is a bijection, and the one that the formats' owners define."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.numerics import packing

WIDTHS = [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place_survives(bits: int) -> None:
    values = torch.stack([torch.arange(2**bits).roll(shift) for shift in range(33)])
    assert torch.equal(packing.unpack(packing.pack(values, bits), bits, 2**bits), values.int())


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_compressed_tensors_packs_the_same_bytes(bits: int, rows: int, columns: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized import helpers as library

    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    ours = packing.pack_to_int32(codes, bits)
    assert torch.equal(ours, library.pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack_from_int32(ours, bits, (rows, columns)), codes)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 99))
def test_gptq_words_go_along_either_dimension(bits: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (64, 96), generator=torch.Generator().manual_seed(seed))
    for dim in (0, 1):
        words = packing.pack_gptq(values, bits, dim)
        assert words.shape[dim] == values.shape[dim] * bits // 32
        assert torch.equal(packing.unpack_gptq(words, bits, dim), values.int())


def test_golden_words() -> None:
    """Bytes written down by hand: the layout can't change unnoticed."""
    assert packing.pack(torch.arange(8)[None], 4).tolist() == [[0x76543210]]
    assert packing.pack(torch.tensor([[1, 0, 0, 255]]), 8).tolist() == [[0xFF000001 - 2**32]]
    # 3 bits: eleven codes of 7 need 33 bits, so the last bit crosses into the second word.
    assert packing.pack(torch.full((1, 11), 7), 3).tolist() == [[-1, 1]]
