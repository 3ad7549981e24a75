"""Where transformers loads a whole model: on a card, over several, or on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workers.model.card_room import count_cards, room_on_card


@dataclass(frozen=True)
class Place:
    """``device``: where inputs go, ``cuda`` or ``cpu``; ``rooms``: bytes of each card, if weights go over several."""

    device: str
    rooms: dict[int, int] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes for it."""
        return {"device_map": "auto", "max_memory": self.rooms} if self.rooms else {"device_map": self.device}


def placed(weights: int) -> Place:
    """The place for so many bytes of weights and an eighth more: the first card that this process sees if it has room,
    several cards if they have, else the CPU."""
    wanted = weights + weights // 8
    rooms = {card: room_on_card(card) for card in range(count_cards())}
    first = rooms.get(0, 0)
    if first and first >= wanted:
        return Place("cuda")
    return Place("cuda", rooms) if len(rooms) > 1 and sum(rooms.values()) >= wanted else Place("cpu")
