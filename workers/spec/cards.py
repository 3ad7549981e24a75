"""Graphics cards that models are served on: memory, and which arithmetic they have."""

from __future__ import annotations

from typing import NamedTuple

from workers.spec.base import meant
from workers.spec.formats import MLX
from workers.spec.recipes import Recipe
from workers.spec.schemes import Float8Scheme, IntScheme, MicroscalingScheme, Scheme


class Card(NamedTuple):
    """One kind of card: its name, bytes of memory, and CUDA compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


# NVIDIA's data sheets: memory in GiB, and the compute capability of the chip.
CARDS = {
    name: Card(name, gib * 2**30, capability)
    for name, gib, capability in (
        ("V100", 32, (7, 0)), ("T4", 16, (7, 5)), ("RTX 3060", 12, (8, 6)), ("RTX 3090", 24, (8, 6)),
        ("A10", 24, (8, 6)), ("A40", 48, (8, 6)), ("A100-40", 40, (8, 0)), ("A100-80", 80, (8, 0)),
        ("L4", 24, (8, 9)), ("L40S", 48, (8, 9)), ("RTX 4060 Ti", 16, (8, 9)), ("RTX 4090", 24, (8, 9)),
        ("H100", 80, (9, 0)), ("H200", 141, (9, 0)), ("B200", 180, (10, 0)), ("RTX 5090", 32, (12, 0)),
    )
}  # fmt: skip
# Compute capabilities from which cards compute in a type: Turing, Ampere, Ada, Blackwell.
INT8, BFLOAT16, FLOAT8, FLOAT4 = (7, 5), (8, 0), (8, 9), (10, 0)


def card_named(name: str) -> Card:
    """The card of a name, whatever its case, spaces and maker's name.

    Raises:
        ValueError: none has that name; those that are known are listed.
    """
    known = {_plain(card): card for card in CARDS}
    if found := known.get(_plain(name)):
        return CARDS[found]
    known_names = ", ".join(CARDS)
    raise ValueError(f"unknown card, got {name!r}; {meant(name, CARDS)}known are {known_names}; or give the memory")


def _plain(name: str) -> str:
    lowered = name.casefold().replace("nvidia", "").replace("geforce", "")
    return "".join(letter for letter in lowered if letter.isalnum())


def lacks(card: Card, recipe: Recipe) -> str | None:
    """What a recipe is made for that a card lacks: its chips, or arithmetic of activations; None if it has all."""
    if recipe.format == MLX.name:
        return f"{card.name} isn't one of Apple's chips, which mlx-lm runs on"
    wanted = _arithmetic(recipe.scheme) if hasattr(recipe, "scheme") else None
    if wanted is None or card.capability >= wanted[1]:
        return None
    return f"{card.name} (compute capability {'.'.join(map(str, card.capability))}) has no {wanted[0]} arithmetic"


def _arithmetic(scheme: Scheme) -> tuple[str, tuple[int, int]] | None:
    """What a scheme multiplies in, where activations are rounded, too, and from which capability on that is there."""
    if isinstance(scheme, MicroscalingScheme):
        if scheme.activations == "none" and scheme.type != "mxfp8":
            return None
        return ("MXFP8" if scheme.type == "mxfp8" else "FP4"), FLOAT4
    if isinstance(scheme, Float8Scheme):
        return "FP8", FLOAT8
    return ("INT8", INT8) if isinstance(scheme, IntScheme) and scheme.activations != "none" else None
