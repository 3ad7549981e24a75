"""How a pass gets through: smaller micro-batches, states that are kept, failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from workers.engines.maker import Maker
from workers.errors import OutOfMemory, StageHung
from workers.machine.failures import describe
from workers.model import batching
from workers.quantize.resume import NotResumable, PassFolder, PassState
from workers.spec.job import ArtifactMade, Failure, Order

# A layer is kept once this much time would be lost with it, and keeping takes at most this share of the pass's time.
KEEPING_SECONDS, KEEPING_SHARE = 10.0, 0.1


def failure_alone(order: Order, error: Exception) -> Failure:
    """An artifact's error ends that artifact alone. Memory and disk are everybody's: those errors are raised on."""
    if isinstance(error, OSError | NotResumable | StageHung):
        raise error
    if batching.ran_out(error):
        raise OutOfMemory(f"recipe {order.recipe.name!r}: out of memory ({error}); use a larger machine") from error
    return describe(error)


def not_made(order: Order, failure: Failure, seconds: float) -> ArtifactMade:
    """The result of an order that failed."""
    return ArtifactMade(recipe=order.recipe.name, path="", bytes=0, seconds=seconds, error=failure)


@dataclass(frozen=True)
class Sizes:
    """Tokens of a micro-batch: at first ``full``; where memory runs out, half as many, down to the ``longest`` text.

    A ``lean`` pass begins with the least, for memory has run out before.
    """

    full: int
    longest: int
    lean: bool

    @property
    def first(self) -> int:
        return min(self.full, self.longest) if self.lean else self.full


def attempts(
    folder: PassFolder, sizes: Sizes, attempt: Callable[[PassState | None, int], None], start_over: Callable[[], None]
) -> None:
    """Call ``attempt`` with the state that is kept and the tokens of a micro-batch until it gets through."""
    state = folder.load()
    if state is not None and state.micro_batch_tokens > sizes.first:
        state = None
    size = state.micro_batch_tokens if state else sizes.first
    while True:
        try:
            return attempt(state, size)
        except NotResumable:
            state = None
        except Exception as error:
            smaller = batching.halved(size, sizes.longest)
            if not batching.ran_out(error) or smaller is None:
                raise
            # Hidden states are kept by micro-batch, so the pass begins anew with the smaller ones.
            size, state = smaller, None
        start_over()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def note_smaller(maker: Maker, size: int, full: int) -> None:
    """Say in a calibrated artifact that memory for whole micro-batches was lacking."""
    if maker.order.recipe.calibrated:
        said = f"calibrated in micro-batches of {size} tokens, for there was no memory for {full}"
        maker.fallbacks[said] = None


class Keeping:
    """Says when the state of a pass is worth keeping: enough was done since, and keeping it is cheap beside that."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()
        self._spent = 0.0

    def worth_it(self) -> bool:
        now = time.monotonic()
        return now - self._last >= KEEPING_SECONDS and self._spent <= KEEPING_SHARE * (now - self._begun)

    @contextmanager
    def timed(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._spent += self._last - begun
