"""How much of a weight is searched at a time: on a CPU what its cache holds, on a card enough for few launches."""

from __future__ import annotations

import torch

# Elements of a piece on a card: temporaries of 128 MiB in float32.
ON_A_CARD = 1 << 25


def rows_at_a_time(width: int, device: torch.device, on_cpu: int) -> int:
    """Rows of so many elements in a piece: ``on_cpu`` there. Each row is searched alone, so results are the same."""
    return on_cpu if device.type == "cpu" else max(1, ON_A_CARD // max(width, 1))


def trials_at_a_time(elements: int, device: torch.device) -> int:
    """Trials of a weight, or a piece of one, of so many elements that are evaluated together: one on a CPU.

    They have few temporaries, which may be larger: a piece for each two of them.
    """
    return 1 if device.type == "cpu" else max(1, 2 * ON_A_CARD // max(elements, 1))
