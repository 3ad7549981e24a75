"""Divides a layer's problems among several cards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from workers.methods.layer import Coded, Layer
from workers.model.cards import CardThread

Batch = TypeVar("Batch")
# A card's thread, and the layer there.
Card = tuple[CardThread, Layer]


def on_cards(
    batches: Iterable[Batch], cards: Sequence[Card], solve: Callable[[Batch, Layer], Iterable[Coded]]
) -> Iterator[Coded]:
    """Solve each batch on the card that is idle first; yield the codes, on that card, in the order of the batches.

    On cards of one kind the codes don't depend on which card solved what.

    Raises: what ``solve`` raises for the first batch that fails, once none is at work any more.
    """
    idle = SimpleQueue[Card]()
    for card in cards:
        idle.put(card)
    waiting = deque[Future[list[Coded]]]()
    try:
        for batch in batches:
            thread, layer = card = idle.get()
            waiting.append(thread.submit(partial(_solved, solve, batch, layer)))
            waiting[-1].add_done_callback(partial(_again, idle, card))
            while waiting and waiting[0].done():
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        wait(waiting)


def _solved(solve: Callable[[Batch, Layer], Iterable[Coded]], batch: Batch, layer: Layer) -> list[Coded]:
    return list(solve(batch, layer))


def _again(idle: SimpleQueue[Card], card: Card, _: object) -> None:
    idle.put(card)
