"""Runs a pass to its end: with smaller micro-batches after running out of memory, checkpoints, and failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from workers.engines.maker import Maker
from workers.errors import OutOfMemory, StageHung
from workers.machine import card_errors
from workers.machine.failures import describe
from workers.model import batching
from workers.quantize.resume import NotResumable, PassFolder, PassState
from workers.spec.job import ArtifactMade, Failure, Order

# A pass is checkpointed when at least this many seconds of work would be lost, and checkpoints take at most this share.
KEEPING_SECONDS, KEEPING_SHARE = 10.0, 0.1


def failure_alone(order: Order, error: Exception) -> Failure:
    """Describe an error that fails one artifact. Errors of memory, disk and cards concern all of them: raise those."""
    if batching.ran_out(error):
        raise OutOfMemory(f"recipe {order.recipe.name!r}: out of memory ({error}); use a larger machine") from error
    if isinstance(error, OSError | NotResumable | StageHung) or card_errors.of_the_machine(error):
        raise error
    return describe(error)


def failed_artifact(order: Order, failure: Failure, seconds: float) -> ArtifactMade:
    """The result of a failed order."""
    return ArtifactMade(recipe=order.recipe.name, path="", bytes=0, seconds=seconds, error=failure)


@dataclass(frozen=True)
class Sizes:
    """Micro-batch sizes in tokens: ``full`` at first, halved when memory runs out, at least the ``longest`` sequence.

    A ``lean`` pass starts with the smallest size, because memory ran out before.
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
    """Call ``attempt(state, micro_batch_tokens)`` with the saved state until it succeeds."""
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
            # Hidden states are saved per micro-batch, so another size starts the pass over.
            size, state = smaller, None
        start_over()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def note_smaller(maker: Maker, size: int, full: int) -> None:
    """Add a fallback to a calibrated artifact: memory didn't allow full micro-batches."""
    if maker.order.recipe.calibrated:
        note = f"calibrated in micro-batches of {size} tokens, for there was no memory for {full}"
        maker.fallbacks[note] = None


def note_data(maker: Maker, notes: Iterable[str]) -> None:
    """Add to a calibrated artifact what was left out of the calibration data."""
    if maker.order.recipe.calibrated:
        maker.fallbacks.update(dict.fromkeys(notes))


class CheckpointTimer:
    """Decides when to checkpoint a pass: after enough work, and only while saving takes a small share of the time."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()
        self._spent = 0.0

    def due(self) -> bool:
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
