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
from workers.model.loading import InputName, QuantizableWeight
from workers.model.statistics import InputStatistics
from workers.numerics import ggml, gptq, grid_fit, refine
from workers.spec.ggml import TYPES
from workers.spec.options import GgufOptions

# What a scale of zero is replaced by while codes are solved: its group is zero whatever its codes are.
TINY = 1e-12
# Elements of a weight outside of the layers whose blocks are fitted at once: bounds the temporaries.
PIECE_ELEMENTS = 1 << 24


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


def least_squares(options: GgufOptions, kind: str, key: str, matrix_OI: Tensor) -> Tensor:
    """Blocks uint8 (O, R) of a weight without statistics: llama.cpp's, then scales and codes of least squared error.

    Raises:
        NumericalError: the weight contains NaN or Inf.
    """
    if options.codes != "solved":
        return encoded(kind, key, matrix_OI)
    pieces = torch.split(matrix_OI, max(PIECE_ELEMENTS // matrix_OI.shape[1], 1))
    return torch.cat([_least_squares(options, kind, key, piece) for piece in pieces])


def under(options: GgufOptions, kind: str, key: str, matrix_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Blocks uint8 (O, R) of a weight outside of the layers, solved under a given H (float32).

    Raises:
        NumericalError: the weight contains NaN or Inf, or H stays indefinite under any damping.
    """
    if options.codes != "solved":
        return encoded(kind, key, matrix_OI)
    statistics, factors = InputStatistics.empty(len(gram_II), "cpu"), Factors()
    statistics.gram_II, statistics.count = gram_II, 1
    pieces = []
    for piece in torch.split(matrix_OI, max(PIECE_ELEMENTS // matrix_OI.shape[1], 1)):
        rows, columns = piece.shape
        weight = QuantizableWeight(key, 0, InputName(key, None), (rows, columns), False)
        pieces += [b.raw_OR for b in code_layer(options, [Matrix(weight, kind, piece, statistics)], factors)]
    return torch.cat(pieces)


def _least_squares(options: GgufOptions, kind: str, key: str, matrix_OI: Tensor) -> Tensor:
    """Each group is a problem of its own, so that all are solved at once, as rows with one group."""
    raw_OR = encoded(kind, key, matrix_OI, torch.ones(matrix_OI.shape[1]))
    grids = _Grids(kind, raw_OR, 1, torch.device("cpu"))
    w_1OI = matrix_OI.detach().to("cpu", torch.float32)[None]
    for _ in range(options.refine):
        grids.fit_alone(w_1OI, grids.rounded(w_1OI))
    return grids.blocks(grids.rounded(w_1OI))[0]


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
        elif options.codes != "solved":
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


class _Grids:
    """The grids of stacked problems of one type, as the solver takes them.

    ``scales`` [B, O, G] are never zero; ``zeros`` are the minima in steps of the scale, and needn't be whole.
    """

    def __init__(self, kind: str, raw_OR: Tensor, problems: int, device: torch.device) -> None:
        self._kind, self._raw_OR, self._problems, self._device = kind, raw_OR, problems, device
        self.nearest = ggml.nearest(kind)
        grid, units = ggml.grid(kind, raw_OR), ggml.units(kind, raw_OR)
        self._scale_BOG = self._stacked(grid.scale_OG)
        self._minimum_BOG = None if grid.minimum_OG is None else self._stacked(grid.minimum_OG)
        free = grid_fit.Steps(None)
        self._steps = free if units is None else grid_fit.Steps(self._stacked(units.scale_OG), units.low, units.high)
        self._minimum_steps = free
        if units is not None and units.minimum_OG is not None:
            self._minimum_steps = grid_fit.Steps(self._stacked(units.minimum_OG), units.low, units.high)

    def _stacked(self, tensor_OG: Tensor) -> Tensor:
        return tensor_OG.view(self._problems, -1, tensor_OG.shape[1]).to(self._device)

    @property
    def scales(self) -> Tensor:
        return torch.where(self._scale_BOG == 0, TINY, self._scale_BOG)

    @property
    def zeros(self) -> Tensor | None:
        return None if self._minimum_BOG is None else self._minimum_BOG / self.scales

    def fit(self, w_BOI: Tensor, h_BII: Tensor, numbers_BOI: Tensor, damping: float) -> None:
        """Move scales and minima to where the loss of these numbers is least."""
        self._scale_BOG, self._minimum_BOG = grid_fit.fit(
            w_BOI, h_BII, numbers_BOI, self._scale_BOG, self._minimum_BOG, self._steps, self._minimum_steps,
            damping=damping,
        )  # fmt: skip

    def fit_alone(self, w_BOI: Tensor, numbers_BOI: Tensor) -> None:
        """Like ``fit`` with H = 1, under which groups don't depend on each other."""
        shape, size = self._scale_BOG.shape, w_BOI.shape[2] // self._scale_BOG.shape[2]
        minimum = None if self._minimum_BOG is None else self._minimum_BOG.reshape(1, -1, 1)
        scale, minimum = grid_fit.fit(
            w_BOI.reshape(1, -1, size), torch.eye(size)[None], numbers_BOI.reshape(1, -1, size),
            self._scale_BOG.reshape(1, -1, 1), minimum, self._steps.alone, self._minimum_steps.alone, damping=0.0,
        )  # fmt: skip
        self._scale_BOG, self._minimum_BOG = scale.view(shape), None if minimum is None else minimum.view(shape)

    def rounded(self, w_BOI: Tensor) -> Tensor:
        """The numbers nearest to weights, float32 [B, O, I]."""
        steps_BOGg = torch.unflatten(w_BOI, 2, (self._scale_BOG.shape[2], -1)) / self.scales[..., None]
        zeros = self.zeros
        return self.nearest(steps_BOGg if zeros is None else steps_BOGg + zeros[..., None]).flatten(2)

    def blocks(self, numbers_BOI: Tensor) -> Tensor:
        """The blocks uint8 [B, O, R] with codes of these numbers, on the CPU."""
        minimum_OG = None if self._minimum_BOG is None else self._minimum_BOG.flatten(0, 1).cpu()
        raw_OR = ggml.with_grid(self._kind, self._raw_OR, ggml.Grid(self._scale_BOG.flatten(0, 1).cpu(), minimum_OG))
        raw_OR = ggml.with_numbers(self._kind, raw_OR, numbers_BOI.flatten(0, 1).cpu())
        return raw_OR.view(self._problems, -1, raw_OR.shape[1])


def _solved(options: GgufOptions, batch: Sequence[_Problem], factors: Factors) -> Iterator[Blocks]:
    """The blocks with codes by GPTQ on their own scales."""
    device = batch[0].matrices[0].matrix_OI.device
    h_BII = torch.stack([problem.statistics.gram_II for problem in batch])
    factor = _factor(options, batch, h_BII, factors)
    w_BOI = torch.stack([torch.cat([each.matrix_OI.float() for each in problem.matrices]) for problem in batch])
    raw_OR = torch.cat([problem.raw_OR for problem in batch])
    grids = _Grids(batch[0].kind, raw_OR, len(batch), device)
    numbers_BOI = gptq.solve_values(w_BOI, factor, grids.scales, grids.nearest, grids.zeros)
    for _ in range(options.refine):
        grids.fit(w_BOI, h_BII, numbers_BOI, options.damping)
        numbers_BOI = refine.descend(
            w_BOI, h_BII, numbers_BOI, grids.scales, grids.nearest, rounds=1, damping=options.damping,
            zero_BOG=grids.zeros,
        )  # fmt: skip
    raw_BOR = grids.blocks(numbers_BOI)
    for problem, raw_OR, damping in zip(batch, raw_BOR, factor.damping_B, strict=True):
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
