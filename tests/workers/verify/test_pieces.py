"""Sequences are compared in pieces of rows: how they are cut makes no difference."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.verify import fidelity

TOKENS, VOCABULARY = 40, 16


@given(rows=st.integers(1, TOKENS + 5), seed=st.integers(0, 100))
def test_pieces_of_any_size_give_the_metrics_of_the_whole(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, TOKENS, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (3, TOKENS), generator=generator)
    whole = fidelity.compare(([pair] for pair in zip(*logits, strict=True)), tokens)
    cut = (zip(theirs.split(rows), ours.split(rows), strict=True) for theirs, ours in zip(*logits, strict=True))
    assert fidelity.compare(cut, tokens) == whole
