"""Has makers quantize a layer: one after the other on one device, or at the same time on several cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain

from workers.engines.maker import Maker
from workers.methods.layer import LayerWork
from workers.model.cards import AnyStreaming, CardStreaming, all_of
from workers.model.folding import Fold
from workers.model.forward import LoadedLayer
from workers.model.statistics import CopiedStatistics, Observer
from workers.spec.split import slice_of

# Returns when a maker's work on the layer is done, or raises what it raised.
Outcome = Callable[[], None]


def outcomes(
    streaming: AnyStreaming,
    layer: LoadedLayer,
    observer: Observer | None,
    folds: Sequence[Fold],
    makers: Sequence[Maker],
) -> list[Outcome]:
    """The outcome of each maker's work on a layer; on one device it begins when the outcome is asked for."""
    if isinstance(streaming, CardStreaming):
        return _at_once(streaming, _works(streaming, layer, observer, folds), makers) if makers else []
    work = LayerWork(layer.index, layer.tensors, observer, folds)
    return [partial(_made, maker, work) for maker in makers]


def by_one(streaming: AnyStreaming, layer: LoadedLayer, observer: Observer, maker: Maker) -> None:
    """Have one maker quantize a layer, on all cards."""
    if isinstance(streaming, CardStreaming):
        (outcome,) = _at_once(streaming, _works(streaming, layer, observer, ()), [maker])
        outcome()
    else:
        _made(maker, LayerWork(layer.index, layer.tensors, observer))


def _made(maker: Maker, work: LayerWork) -> None:
    with maker.timed():
        maker.layer(work)


def _tried(maker: Maker, work: LayerWork) -> Future[None]:
    """What became of a maker's work: its error is its own, not its card's."""
    outcome = Future[None]()
    try:
        _made(maker, work)
    except Exception as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(None)
    return outcome


def _works(
    streaming: CardStreaming, layer: LoadedLayer, observer: Observer | None, folds: Sequence[Fold]
) -> list[LayerWork]:
    """A layer as makers on each card see it; ``cards`` is that card alone."""
    works = []
    for card, tensors in enumerate((layer.tensors, *layer.others)):
        solver = streaming.solvers[card]
        seen = observer if observer is None or card == 0 else CopiedStatistics(observer, solver.device)
        work = LayerWork(layer.index, tensors, seen, folds)
        works.append(replace(work, cards=((solver, work),)))
    return works


def _at_once(streaming: CardStreaming, works: Sequence[LayerWork], makers: Sequence[Maker]) -> list[Outcome]:
    """Have makers work on the cards, the calibrated ones first, for they take the longest.

    A card takes the next maker when it is done with one. With fewer makers than cards each has several cards.
    """
    groups = min(len(makers), len(works))
    shares = [works[slice_of(len(works), group, groups)] for group in range(groups)]
    shares.sort(key=len, reverse=True)
    # The threads take makers from one iterator over a list, which gives each to one of them.
    order = iter(sorted(makers, key=lambda maker: not maker.order.recipe.calibrated))
    ended: dict[int, Future[None]] = {}

    def work_off(first: Maker, work: LayerWork) -> None:
        for maker in chain([first], order):
            ended[id(maker)] = _tried(maker, work)

    threads = {id(work): thread for work, thread in zip(works, streaming.threads, strict=True)}
    begun = [
        threads[id(share[0])].submit(partial(work_off, first, _joined(share)))
        for first, share in zip([next(order) for _ in shares], shares, strict=True)
    ]
    all_of(begun)
    return [ended[id(maker)].result for maker in makers]


def _joined(share: Sequence[LayerWork]) -> LayerWork:
    """The work of a maker on these cards: on the first, which divides the problems among all if there are several."""
    if len(share) == 1:
        return replace(share[0], cards=())
    # All have the same weights: the first card is asked whether they are finite.
    cards = [(thread, replace(there, finite=share[0].finite)) for work in share for thread, there in work.cards]
    return replace(share[0], cards=cards)
