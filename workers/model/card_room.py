"""How much of a GPU this process may have; a job that shares one is held to its share."""

from __future__ import annotations

import torch

from workers.machine import card_share


def has_card() -> bool:
    """Whether there is a GPU for this process, which is held to its share of it from then on."""
    share = card_share.share_of()
    if not share or not torch.cuda.is_available():
        return False
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)  # more is out of memory, as on a card of that size
    return True


def count_cards() -> int:
    """Number of GPUs that this process computes on: all that it sees, or the one that it has a share of; 0: none."""
    if not has_card():
        return 0
    return torch.cuda.device_count() if card_share.share_of() == 1 else 1


def room_on_card(card: int = 0) -> int:
    """Bytes of a GPU, by default the first, that this process can still have; 0 without one."""
    if not has_card():
        return 0
    free, total = torch.cuda.mem_get_info(card)
    return max(0, min(free, int(card_share.share_of() * total) - torch.cuda.memory_reserved(card)))


def environment_of_child() -> dict[str, str] | None:
    """Environment of a child that may have what this process leaves of its share; None: this process's own."""
    if card_share.share_of() == 1 or not torch.cuda.is_available():
        return None
    return card_share.left(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
