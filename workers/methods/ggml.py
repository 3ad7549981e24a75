"""Chooses the blocks of weights in ggml's types: scales by llama.cpp's encoder, codes by GPTQ on them.

Weights with one input and one type are solved as one problem, and the experts of a layer are stacked.
B problems, O output features, I input features, G groups, R bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import NumericalError
from workers.machine import ggml_library
from workers.methods.layer import Factors, require_finite
from workers.methods.linear import STACKED_ELEMENTS
from workers.model.loading import QuantizableWeight
from workers.model.statistics import InputStatistics
from workers.numerics import ggml, gptq, refine
from workers.spec.ggml import TYPES
from workers.spec.recipes import GgufOptions

# What a scale of zero is replaced by while codes are solved: its group is zero whatever its codes are.
TINY = 1e-12


@dataclass(frozen=True)
class Matrix:
    """A weight [O, I] on the model's device, its type, and the statistics of its input (None: no token came to it)."""

    weight: QuantizableWeight
    kind: str
    matrix_OI: Tensor
    statistics: InputStatistics | None


@dataclass(frozen=True)
class Blocks:
    """A weight's blocks, uint8 (O, R) on the CPU, and deviations from the recipe."""

    weight: QuantizableWeight
    kind: str
    raw_OR: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Problem:
    """Matrices with one input and one type, their rows stacked."""

    matrices: tuple[Matrix, ...]
    raw_OR: Tensor
    statistics: InputStatistics

    @property
    def kind(self) -> str:
        return self.matrices[0].kind

    @property
    def rows(self) -> list[int]:
        return [len(each.matrix_OI) for each in self.matrices]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.matrices[0].matrix_OI.shape[1]


def encoded(kind: str, key: str, matrix_OI: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """llama.cpp's blocks, uint8 (O, R), on the CPU; ``importance_I`` weighs the columns.

    Raises:
        NumericalError: the weight contains NaN or Inf.
    """
    weight_OI = require_finite(key, matrix_OI).detach().to("cpu", torch.float32).contiguous()
    rows, columns = weight_OI.shape
    raw_OR = torch.empty(rows, TYPES[kind].row_bytes(columns), dtype=torch.uint8)
    weights = None if importance_I is None else importance_I.detach().to("cpu", torch.float32).contiguous()
    pointer = None if weights is None else weights.data_ptr()
    ggml_library.encode(kind, weight_OI.data_ptr(), raw_OR.data_ptr(), rows, columns, pointer)
    return raw_OR


def importance(statistics: InputStatistics | None) -> Tensor | None:
    """The importance of each column: the mean square of its input; None if no token came to it."""
    if statistics is None or statistics.count == 0:
        return None
    mean_I = statistics.gram_II.diagonal() / statistics.count
    return mean_I if bool((mean_I > 0).any()) else None


def code_layer(options: GgufOptions, matrices: Sequence[Matrix], factors: Factors) -> Iterator[Blocks]:
    """The blocks of a layer's weights.

    Raises:
        NumericalError: a weight contains NaN or Inf, or its statistics stay indefinite under any damping.
    """
    together: dict[tuple[int, str], list[tuple[Matrix, Tensor]]] = {}
    for each in matrices:
        weights_I = importance(each.statistics)
        raw_OR = encoded(each.kind, each.weight.key, each.matrix_OI, weights_I)
        if each.statistics is None or weights_I is None:
            note = f"rounded without importances, for no calibration token came to it: {each.weight.module}"
            yield Blocks(each.weight, each.kind, raw_OR, (note,))
        elif options.codes != "solved" or ggml.LAYOUTS[each.kind].table is not None:
            yield Blocks(each.weight, each.kind, raw_OR)
        else:
            # Experts that share statistics stay problems of their own, which are stacked as far as memory allows.
            alone = id(each) if each.weight.input.expert is not None else id(each.statistics)
            together.setdefault((alone, each.kind), []).append((each, raw_OR))
    for batch in _batches(_problem(group) for group in together.values()):
        yield from _solved(options, batch, factors)


def _problem(group: Sequence[tuple[Matrix, Tensor]]) -> _Problem:
    statistics = group[0][0].statistics
    assert statistics is not None, "only matrices with statistics are solved"
    return _Problem(tuple(each for each, _ in group), torch.cat([raw for _, raw in group]), statistics)


def _batches(problems: Iterable[_Problem]) -> Iterator[list[_Problem]]:
    """Problems of experts of one shape and type, as far as memory allows; others one by one."""
    open_: dict[tuple[object, ...], list[_Problem]] = {}
    for problem in problems:
        if problem.matrices[0].weight.input.expert is None:
            yield [problem]
            continue
        rows, columns = problem.shape
        batch = open_.setdefault((problem.kind, rows, columns), [])
        batch.append(problem)
        if (len(batch) + 1) * rows * columns > STACKED_ELEMENTS:
            yield open_.pop((problem.kind, rows, columns))
    yield from open_.values()


def _solved(options: GgufOptions, batch: Sequence[_Problem], factors: Factors) -> Iterator[Blocks]:
    """The blocks with codes by GPTQ on their own scales."""
    layout, device = ggml.LAYOUTS[batch[0].kind], batch[0].matrices[0].matrix_OI.device
    h_BII = torch.stack([problem.statistics.gram_II for problem in batch])
    factor = _factor(options, batch, h_BII, factors)
    w_BOI = torch.stack([torch.cat([each.matrix_OI.float() for each in problem.matrices]) for problem in batch])
    # The solver's codes are centred; its zero points are the minimum in steps of the scale, and needn't be whole.
    centre = layout.low + (1 << layout.bits - 1)
    grids = [ggml.grid(problem.kind, problem.raw_OR) for problem in batch]
    scale_BOG = torch.stack([grid.scale_OG for grid in grids]).to(device)
    scale_BOG = torch.where(scale_BOG == 0, TINY, scale_BOG)
    minima = [grid.minimum_OG for grid in grids if grid.minimum_OG is not None]
    zero_BOG = torch.stack(minima).to(device) / scale_BOG - centre if minima else None
    codes_BOI = gptq.solve(w_BOI, factor, scale_BOG, zero_BOG, bits=layout.bits)
    if options.refine:
        codes_BOI = refine.descend(
            w_BOI, h_BII, codes_BOI, scale_BOG, zero_BOG, bits=layout.bits, rounds=options.refine,
            damping=options.damping,
        )  # fmt: skip
    for problem, codes_OI, damping in zip(batch, codes_BOI, factor.damping_B, strict=True):
        raw_OR = ggml.with_codes(problem.kind, problem.raw_OR, codes_OI.to("cpu", torch.int16) + centre)
        raised = f"damping raised from {options.damping:g} to {damping:g} for {problem.matrices[0].weight.module}"
        notes = (f"{raised}: H wasn't positive definite",) if damping > options.damping else ()
        for each, raw in zip(problem.matrices, torch.split(raw_OR, problem.rows), strict=True):
            yield Blocks(each.weight, each.kind, raw, notes)


def _factor(options: GgufOptions, batch: Sequence[_Problem], h_BII: Tensor, factors: Factors) -> gptq.Factor:
    seen = tuple(problem.statistics for problem in batch)
    try:
        return factors.of(seen, h_BII, activation_order=True, damping=options.damping)
    except gptq.NotPositiveDefinite as error:
        key = batch[0].matrices[0].weight.key
        raise NumericalError(f"ggml: {key}: {error}; calibrate on other text") from error
