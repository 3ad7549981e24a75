"""Splits the pass over one model across workers: which jobs can be split, each part's share, and the disk space.

Pure, and without torch: the driver plans with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workers.spec.engines import ENGINES
from workers.spec.job import Job


def spreadable(job: Job) -> bool:
    """Whether a job's pass can be split: no recipe calibrates on its own quantized layers one after the other."""
    return not sequential(job)


def sequential(job: Job) -> list[str]:
    """Names of the recipes that can't be spread: ``propagate: quantized``, or an engine that makes whole artifacts."""
    whole = whole_engines(job)
    recipes = [order.recipe for order in job.orders]
    return [recipe.name for recipe in recipes if recipe.needs.own_stream or recipe.name in whole]


def whole_engines(job: Job) -> list[str]:
    """Names of the recipes that an engine makes whole, in a process of its own."""
    return [order.recipe.name for order in job.orders if ENGINES[order.recipe.engine].script]


def slice_of(count: int, part: int, parts: int) -> slice:
    """The items of one part: consecutive, and as many as in the other parts, or one more."""
    return slice(part * count // parts, (part + 1) * count // parts)


def layers_of(work: Sequence[int], part: int, parts: int) -> list[int]:
    """The layers of one part, in order, by ``work`` per layer: the largest first, each to the least loaded part."""
    loads, shares = [0] * parts, [list[int]() for _ in range(parts)]
    for layer in sorted(range(len(work)), key=lambda index: (-work[index], index)):
        least = loads.index(min(loads))
        loads[least] += work[layer]
        shares[least].append(layer)
    return sorted(shares[part])


def gathered_bytes(tokens: int, widths: Iterable[int], itemsize: int) -> int:
    """Disk space in bytes between gather and join, besides the artifacts' own, for a number of calibration tokens.

    ``widths``: widths of the distinct inputs of all layers (q, k and v share one, gate and up share one); of experts,
    as many as a token is routed to. The widths of all quantizable weights are an upper bound. ``itemsize``: bytes of an
    activation; 2 on a GPU, at most 4 on a CPU.
    """
    return tokens * itemsize * sum(widths)
