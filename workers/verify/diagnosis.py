"""Diagnoses why a quantized weight is far from its source: finds the single fault whose correction explains it.

The candidates are faults of real tools, each tried on some rows: codes in another order, scales or zero points that
don't belong to the codes, a transposed weight, another layer's weight. Correct rounding shows none of them: a weight
that a correction brings much closer to its source was stored wrongly, not rounded badly.

O outputs, I inputs, R sampled rows, G groups of K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from workers.numerics.divergence import decibels, powers, sqnr_db

ROWS = 256
# Minimum gain in dB by correcting a fault: half or a quarter of the noise. Refitting alone gains at most 1 to 2.
GAIN, LARGE_GAIN = 3.0, 6.0
# Minimum SQNR in dB after correcting a fault for the fault to be reported.
MIN_CORRECTED_SQNR = 6.0
# Number of inputs that share a fitted scale: at most the group size of any format.
GROUP = 16
# SQNR in dB below which the noise is stronger than the signal.
LOST = 0.0
SCALES, ZEROS = "its scales aren't those of its codes", "its zero points aren't those of its codes"
# Orders of eight codes: neighbours, pairs or halves swapped (halves of bytes, also AWQ's), a word reversed, AWQ's own
# order and its inverse.
ORDERS = {
    "swapped one by one": (1, 0, 3, 2, 5, 4, 7, 6),
    "swapped two by two": (2, 3, 0, 1, 6, 7, 4, 5),
    "swapped four by four": (4, 5, 6, 7, 0, 1, 2, 3),
    "word by word, reversed": (7, 6, 5, 4, 3, 2, 1, 0),
    "as AWQ interleaves them": (0, 2, 4, 6, 1, 3, 5, 7),
    "as if AWQ had interleaved them": (0, 4, 1, 5, 2, 6, 3, 7),
}


@dataclass(frozen=True)
class Diagnosis:
    """A weight's SQNR to its source in dB, and its fault; empty if there is none."""

    sqnr: float
    fault: str = ""


class Tried(NamedTuple):
    """A fault, the minimum gain in dB to report it, and the powers (``divergence.powers``) of the rows without it."""

    fault: str
    least: float
    powers: Tensor


def diagnose(want_OI: Tensor, got_OI: Tensor, others: Callable[[], Iterable[tuple[str, Tensor]]]) -> Diagnosis:
    """Compare a decoded weight with its source; ``others`` yields source weights that it may have been confused with.

    Both are on one device, which is waited for once. ``others`` is only called if the weight doesn't resemble its
    source at all.
    """
    rows_R = _rows(len(want_OI), got_OI.device)
    want_RI, got_RI = want_OI[rows_R].float(), got_OI[rows_R].float()
    tried = list(_corrections(want_OI, got_OI, rows_R, want_RI, got_RI))
    measured = [powers(want_OI, got_OI), powers(want_RI, got_RI), *(each.powers for each in tried)]
    sqnr, sqnr_of_rows, *undone = (decibels(*pair) for pair in torch.stack(measured).tolist())
    best, gain = "", 0.0
    of_faults = {each.fault: value for each, value in zip(tried, undone, strict=True)}
    for each in tried:
        if each.fault == ZEROS and of_faults[ZEROS] - of_faults[SCALES] <= GAIN:
            continue  # offsets that hardly help beside the scales
        improvement = of_faults[each.fault] - sqnr_of_rows
        if improvement > max(each.least, gain) and sqnr_of_rows + improvement > MIN_CORRECTED_SQNR:
            best, gain = each.fault, improvement
    if not best and sqnr < LOST + LARGE_GAIN:
        best, gain = _other(got_RI, rows_R, sqnr_of_rows, others)
    if best:
        return Diagnosis(sqnr, f"{best} ({sqnr:.1f} dB from its source; mended, {sqnr_of_rows + gain:.1f})")
    if sqnr < LOST:
        return Diagnosis(sqnr, f"is {sqnr:.1f} dB from its source, noise stronger than signal")
    return Diagnosis(sqnr)


@lru_cache(maxsize=64)
def _rows(count: int, device: torch.device) -> Tensor:
    """At most ``ROWS`` row indices across the weight, in blocks of eight, since formats pack rows, too."""
    if count <= ROWS or count % 8:
        return torch.arange(count)[:: max(1, count // ROWS)].to(device)
    blocks = torch.linspace(0, count // 8 - 1, ROWS // 8).long()
    return (blocks[:, None] * 8 + torch.arange(8)).flatten().to(device)


@lru_cache(maxsize=8)
def _orders(device: torch.device) -> Tensor:
    """The ``ORDERS``, int64 [F, 8]."""
    return torch.tensor(list(ORDERS.values())).to(device)


def _corrections(want_OI: Tensor, got_OI: Tensor, rows_R: Tensor, want_RI: Tensor, got_RI: Tensor) -> Iterator[Tried]:
    """Yield each fault, with what the rows are without it."""
    scaled_RI, moved_RI = _fitted(want_RI, got_RI)
    yield Tried(SCALES, GAIN, powers(want_RI, scaled_RI))
    yield Tried(ZEROS, GAIN, powers(want_RI, moved_RI))
    yield Tried("its sign is turned", LARGE_GAIN, powers(want_RI, -got_RI))
    for name, order_8 in zip(ORDERS, _orders(got_RI.device), strict=True):
        if got_RI.shape[1] % 8 == 0:
            ordered_RI = _ordered(got_RI, order_8)
            yield Tried(f"its inputs are in another order ({name})", LARGE_GAIN, powers(want_RI, ordered_RI))
        if len(got_RI) % 8 == 0:
            # Scales and zero points that weren't reordered then belong to other outputs: refit them.
            moved_RI = _fitted(want_RI, _ordered(got_RI.T, order_8).T)[1]
            yield Tried(f"its outputs are in another order ({name})", LARGE_GAIN, powers(want_RI, moved_RI))
    if want_OI.shape[0] == want_OI.shape[1]:
        yield Tried("it is transposed", LARGE_GAIN, powers(want_RI, got_OI.T[rows_R].float()))


def _ordered(matrix: Tensor, order_8: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape[:-1], -1, 8)[..., order_8].flatten(-2)


def _fitted(want_RI: Tensor, got_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The rows under the best-fitting scales per group, and under the best-fitting scales and offsets."""
    size = GROUP if want_RI.shape[1] % GROUP == 0 else want_RI.shape[1]
    want_RGK, got_RGK = (rows.reshape(len(rows), -1, size).double() for rows in (want_RI, got_RI))
    scaled = got_RGK * _ratio(want_RGK, got_RGK)
    mean_want, mean_got = want_RGK.mean(-1, keepdim=True), got_RGK.mean(-1, keepdim=True)
    moved = (got_RGK - mean_got) * _ratio(want_RGK - mean_want, got_RGK - mean_got) + mean_want
    return scaled.flatten(1), moved.flatten(1)


def _ratio(want_RGK: Tensor, got_RGK: Tensor) -> Tensor:
    power = got_RGK.square().sum(-1, keepdim=True)
    return torch.where(power > 0, (want_RGK * got_RGK).sum(-1, keepdim=True) / power, 1.0)


def _other(
    got_RI: Tensor, rows_R: Tensor, sqnr_of_rows: float, others: Callable[[], Iterable[tuple[str, Tensor]]]
) -> tuple[str, float]:
    for name, other_OI in others():
        improvement = sqnr_db(other_OI.to(got_RI.device)[rows_R].float(), got_RI) - sqnr_of_rows
        if improvement > LARGE_GAIN:
            return f"it holds {name}", improvement
    return "", 0.0
