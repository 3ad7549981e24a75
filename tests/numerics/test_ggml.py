"""ggml's blocks: gguf decodes the same bits (stored here), and codes are exchanged without touching anything else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from workers.numerics import ggml
from workers.spec.ggml import FILE_TYPES, NARROW, TYPES

# One row of 512 weights of each type, as llama.cpp's encoder (xllamacpp 2026.10.11549) wrote it and with random codes,
# and what gguf 0.19.0 decodes it to; tests/workers/formats/test_gguf.py compares anew where they are installed.
GOLDEN = load_file(Path(__file__).parent / "ggml_blocks.safetensors")
KINDS = sorted(ggml.LAYOUTS)


def test_each_type_has_a_layout_of_its_size() -> None:
    assert set(ggml.LAYOUTS) == set(TYPES) == {*(row.kind for row in FILE_TYPES.values()), *NARROW.values()}
    for kind, layout in ggml.LAYOUTS.items():
        assert (layout.block, layout.bytes) == TYPES[kind][1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", ["own", "random"])
def test_blocks_decode_to_the_bits_that_gguf_gives(kind: str, codes: str) -> None:
    decoded = ggml.decode(kind, GOLDEN[f"{kind}.{codes}.blocks"])
    assert torch.equal(decoded, GOLDEN[f"{kind}.{codes}.decoded"])


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_codes_are_exchanged_and_nothing_else(kind: str, seed: int, rows: int, blocks: int) -> None:
    layout, random = ggml.LAYOUTS[kind], torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, blocks * layout.bytes), generator=random, dtype=torch.uint8)
    assert torch.equal(ggml.with_codes(kind, raw, ggml.codes(kind, raw)), raw)
    shape = (rows, blocks * layout.block)
    codes = torch.randint(layout.low, layout.high + 1, shape, generator=random, dtype=torch.int16)
    changed = ggml.with_codes(kind, raw, codes)
    assert torch.equal(ggml.codes(kind, changed), codes)
    before, after = ggml.grid(kind, raw), ggml.grid(kind, changed)
    assert torch.equal(before.scale_OG, after.scale_OG) or before.scale_OG.isnan().any()
    assert ggml.codes(kind, raw).min() >= layout.low
    assert ggml.codes(kind, raw).max() <= layout.high
