"""A layer of an 8B on a card by counts: launches, waits and operations, and the seconds they take at stated rates.

python -m tests.bench.bench_counts

Needs no card: counted on the stand-in (tests/device) for layers 512 and 1024 wide, from which those 4096 wide follow,
because pieces are as many and operations grow as their bounds (``tests.bench.roofline``) do. Three minutes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.bench import gpu_stack, roofline
from tests.device import card
from workers.spec.workspace import MICRO_BATCH_TOKENS

HIDDEN, INNER, SAMPLES, LENGTH = 4096, 14336, 128, 2048
# Samples of the counted passes: one micro-batch, and two. Their length, and the tokens of the held-out text.
FEW, MORE, SHORT = 2, 64, 128
HELD_OUT = 16 * SHORT
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Counted:
    """What a recipe takes for a layer, or what is beside all: the seconds follow from it, at least ``bound``."""

    launches: int
    waits: int
    seconds: float
    bound: float


def measured() -> tuple[Counts, Counts, Counts]:
    """Counts of a layer 512 wide, of one 1024 wide, and of that with another micro-batch."""
    runs = (("512", FEW), ("1024", FEW), ("1024", MORE))
    half, whole, more = (
        json.loads(card.run("tests.device.work", "layer", width, str(samples), seconds=900)) for width, samples in runs
    )
    return half, whole, more


def counted(half: Counts, whole: Counts, more: Counts) -> dict[str, Counted]:
    """By recipe, and ``beside`` for the forwards, statistics and search for folds, with all micro-batches."""
    found = {}
    small, large = _shapes(1024), _shapes(HIDDEN)
    for name, of in whole.items():
        launches = of["launches"] + 6 * (of["launches"] - half[name]["launches"])
        if name == "beside":
            expected = _beside(1024, FEW * SHORT, SHORT, HELD_OUT)
            arithmetic = bound = _beside(HIDDEN, SAMPLES * LENGTH, LENGTH, 0)
            # Of the operations all but the attention's and those of the search for folds are in the bound.
            arithmetic *= of["operations"] / (expected * roofline.BF16)
            batches = SAMPLES * LENGTH // MICRO_BATCH_TOKENS
            launches += (batches - 1) * (more[name]["launches"] - of["launches"])
        else:
            bound = arithmetic = roofline.recipe(name, large)
            if products := roofline.products(name, small):
                share = of["operations"] / products
                arithmetic += (share - 1) * roofline.products(name, large) / roofline.TF32
        processor = launches * roofline.LAUNCH + of["waits"] * roofline.WAIT
        found[name] = Counted(launches, of["waits"], arithmetic + processor, bound)
    return found


def _shapes(hidden: int) -> list[tuple[int, int]]:
    return list(gpu_stack.shapes_of(hidden, hidden * INNER // HIDDEN).values())


def _beside(hidden: int, tokens: int, length: int, held_out: int) -> float:
    """Bound in seconds of the forwards and statistics."""
    shapes, inputs = _shapes(hidden), (hidden, hidden, hidden, hidden * INNER // HIDDEN)
    return roofline.forward(shapes, tokens + held_out, length, hidden) + roofline.statistics(inputs, tokens)


def summed(found: dict[str, Counted], recipes: tuple[str, ...]) -> Counted:
    """A layer under these recipes."""
    parts = [found[name] for name in (*recipes, "beside")]
    return Counted(*(sum(getattr(part, name) for part in parts) for name in Counted.__dataclass_fields__))


def main() -> None:
    found: dict[str, Any] = counted(*measured())
    rows = found | {f"{len(recipes)} recipe(s)": summed(found, recipes) for recipes in (gpu_stack.ONE, gpu_stack.EIGHT)}
    print("| a layer of an 8B, 128 x 2048 tokens | launches | waits | seconds by counts | bound |")
    print("|---|---|---|---|---|")
    for name, of in rows.items():
        print(f"| {name} | {of.launches:,} | {of.waits} | {of.seconds:.3f} | {of.bound:.3f} |")


if __name__ == "__main__":
    main()
