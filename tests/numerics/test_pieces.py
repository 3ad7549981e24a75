"""Pieces of a search: what a CPU's cache holds, or what a card does in a launch."""

import torch

from pipeline.planning import sizing
from workers.numerics.pieces import ON_A_CARD, rows_at_a_time


def test_a_card_takes_large_pieces_and_sizing_counts_them() -> None:
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert rows_at_a_time(4096, cpu, 64) == 64
    assert rows_at_a_time(4096, card, 64) * 4096 == ON_A_CARD
    assert rows_at_a_time(2 * ON_A_CARD, card, 64) == 1
    assert sizing.SEARCH_BYTES == 8 * 4 * ON_A_CARD
