"""Quantizes a layer's linear weights to codes from their statistics, for all of our own methods.

Weights that share an input are solved as one problem (q, k, v; gate, up), and the experts of a layer are stacked.
B problems, O output features, I input features, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from workers.methods.cards import Card, on_cards
from workers.methods.layer import Coded, Layer, Problem, Solved, Stack, Stacked
from workers.methods.table import METHODS
from workers.model.loading import QuantizableWeight
from workers.numerics import fp8, microscaling
from workers.numerics.codes import Float4Weight, Float8Weight, IntWeight, Mxfp8Weight
from workers.numerics.grids import E2M1, E4M3
from workers.spec.formats import FORMATS
from workers.spec.fusion import fused_group, together
from workers.spec.recipes import LinearRecipe
from workers.spec.schemes import Float8Scheme, IntScheme, LinearScheme, MicroscalingScheme, has_tensor_scale

# Maximum number of weight elements stacked into one problem: bounds the memory of a layer with many experts. Stacks of
# a million save the time of many small products; larger ones take memory that the plan doesn't count, and no less time.
STACKED_ELEMENTS = 1 << 20
NEAREST = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}


def code_layer(
    recipe: LinearRecipe,
    weights: Sequence[tuple[QuantizableWeight, LinearScheme]],
    layer: Layer,
    cards: Sequence[Card] = (),
) -> Iterator[Coded]:
    """Quantize the weights of one layer, on several cards if there are any.

    Raises:
        NumericalError: a weight's statistics stay indefinite under any damping.
    """
    batches = _batches(_groups(weights, layer))
    solve = partial(_solved, recipe)
    if cards:
        yield from on_cards(batches, cards, solve)
        return
    for batch in batches:
        yield from solve(batch, layer)


@dataclass(frozen=True)
class _Group:
    """Weights with one input and one scheme: a problem that isn't read yet."""

    weights: tuple[QuantizableWeight, ...]
    scheme: LinearScheme

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of their rows, stacked."""
        return sum(weight.shape_OI[0] for weight in self.weights), self.weights[0].shape_OI[1]

    def problem(self, layer: Layer) -> Problem:
        """The problem, where the layer is."""
        matrices = [layer.read(weight) for weight in self.weights]
        matrix_OI = matrices[0].contiguous() if len(matrices) == 1 else torch.cat(matrices)
        return Problem(self.weights, self.scheme, matrix_OI, layer.statistics(self.weights[0]))


def _groups(weights: Sequence[tuple[QuantizableWeight, LinearScheme]], layer: Layer) -> Iterator[_Group]:
    together: dict[tuple[object, LinearScheme], list[QuantizableWeight]] = {}
    for weight, scheme in weights:
        statistics = layer.statistics(weight)
        # Experts that share statistics stay separate problems: they are stacked as far as memory allows.
        name: object = (id(statistics), weight.input.expert)
        if statistics is None:
            # What runtimes fuse shares a global scale, and is coded together.
            name = (fused_group(weight.module) if has_tensor_scale(scheme) else None) or weight.key
        together.setdefault((name, scheme), []).append(weight)
    # Checkpoints list an expert's weights one after another: those of one shape come together, to be stacked.
    shapes = {key: [weight.shape_OI for weight in group] for key, group in together.items()}
    order = sorted(together, key=lambda key: (together[key][0].input.expert is not None, shapes[key]))
    for key in order:
        yield _Group(tuple(together[key]), key[1])


def _batches(groups: Iterable[_Group]) -> Iterator[list[_Group]]:
    """Problems one by one, except experts of equal shape, which are stacked as far as memory allows."""
    batch: list[_Group] = []
    for group in groups:
        fits = (
            batch
            and group.weights[0].input.expert is not None
            and group.shape == batch[0].shape
            and group.scheme == batch[0].scheme
            and len(group.weights) == len(batch[0].weights)
            and (len(batch) + 1) * math.prod(group.shape) <= STACKED_ELEMENTS
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _solved(recipe: LinearRecipe, batch: list[_Group], layer: Layer) -> Iterator[Coded]:
    yield from _code(recipe, [group.problem(layer) for group in batch], layer)


def _stacked(batch: Sequence[Problem]) -> Tensor:
    """The weights of problems of one shape, [B, O, I]; of a single one without a copy."""
    if len(batch) == 1:
        return batch[0].matrix_OI[None]
    return torch.stack([problem.matrix_OI for problem in batch])


def _code(recipe: LinearRecipe, batch: list[Problem], layer: Layer) -> Iterator[Coded]:
    match batch[0].scheme:
        case IntScheme() as scheme:
            yield from _code_int(recipe, scheme, batch, layer)
        case Float8Scheme() as scheme:
            for problem in batch:
                yield from _code_fp8(scheme, problem, layer)
        case MicroscalingScheme() as scheme:
            yield from _code_microscaled(recipe, scheme, batch, layer)


# ------------------------------------------------------------------------------------------- integers


def _code_int(recipe: LinearRecipe, scheme: IntScheme, batch: list[Problem], layer: Layer) -> Iterator[Coded]:
    w_BOI = _stacked(batch)
    row = FORMATS[recipe.format]
    scale_dtype = torch.float16 if row.scale_dtype == "float16" else layer.dtype
    stack = Stack(batch, w_BOI, layer.factors, scheme, scale_dtype, row.real_zeros)
    solved = METHODS[recipe.method].solve(recipe, stack)
    for index, problem in enumerate(batch):
        yield from _split(problem, scheme, solved, index)


def _split(problem: Problem, scheme: IntScheme, solved: Solved, index: int) -> Iterator[Coded]:
    """Split the stacked rows of one problem into its weights."""
    sizes = [weight.shape_OI[0] for weight in problem.weights]
    codes = torch.split(solved.codes_BOI[index], sizes)
    scales = torch.split(solved.scale_BOG[index], sizes)
    zeros = [None] * len(sizes) if solved.zero_BOG is None else torch.split(solved.zero_BOG[index], sizes)
    for number, (weight, codes_OI, scale_OG, zero_OG) in enumerate(
        zip(problem.weights, codes, scales, zeros, strict=True)
    ):
        coded = IntWeight(codes_OI, scale_OG, zero_OG, scheme.bits, scheme.group_size)
        yield Coded(weight, coded, solved.notes[index] if solved.notes and number == 0 else ())


# ------------------------------------------------------------------------------------------- floats


def _code_fp8(scheme: Float8Scheme, problem: Problem, layer: Layer) -> Iterator[Coded]:
    input_scale: Tensor | None = None
    notes: tuple[str, ...] = ()
    if scheme.activations == "static":
        input_scale, notes = _input_scale(problem, layer.dtype)
    dtype = torch.float32 if scheme.scales == "block" else layer.dtype
    matrices = {weight.module: matrix_OI for weight, matrix_OI in zip(problem.weights, _matrices(problem), strict=True)}
    largest = _fused_maxima(matrices) if scheme.scales == "tensor" else {}
    for weight, matrix_OI in zip(problem.weights, matrices.values(), strict=True):
        values_OI, scale = fp8.quantize(matrix_OI, scheme.scales, scale_dtype=dtype, largest=largest.get(weight.module))
        coded = Float8Weight(values_OI, scale, blocks=scheme.scales == "block", input_scale=input_scale)
        yield Coded(weight, coded, notes)


def _input_scale(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, tuple[str, ...]]:
    statistics = problem.statistics
    if statistics is None or statistics.count == 0:
        name = problem.weights[0].module
        scale = fp8.input_scale(torch.ones(1, device=problem.matrix_OI.device)).to(dtype)
        return scale, (f"activation scale of 1/448, for no calibration token came to it: {name}",)
    return fp8.input_scale(statistics.abs_max_I.amax().reshape(1)).to(dtype), ()


def _code_microscaled(
    recipe: LinearRecipe, scheme: MicroscalingScheme, batch: list[Problem], layer: Layer
) -> Iterator[Coded]:
    solver = METHODS[recipe.method].values
    stack = Stacked(batch, _stacked(batch), layer.factors)
    importances = _importances(stack) if solver else [None] * len(batch)
    shared = FORMATS[recipe.format].tensor_scales
    grids = [
        _Grid.of(scheme, problem, i_I, tensor_scales=shared) for problem, i_I in zip(batch, importances, strict=True)
    ]
    notes: Sequence[tuple[str, ...]] = [()] * len(batch)
    if solver is None:
        coded = [grid.rounded() for grid in grids]
    else:
        scale_BOG = torch.stack([grid.scales for grid in grids])
        values_BOI, notes = solver(recipe, stack, scale_BOG, NEAREST[scheme.type])
        coded = [grid.with_values(values_OI) for grid, values_OI in zip(grids, values_BOI, strict=True)]
    for problem, weights, said in zip(batch, coded, notes, strict=True):
        scale, also = _input_global_scale(scheme, problem)
        for number, (weight, one) in enumerate(zip(problem.weights, weights, strict=True)):
            whole = replace(one, input_global_scale=scale) if isinstance(one, Float4Weight) else one
            yield Coded(weight, whole, (*said, *also) if number == 0 else ())


def _importances(stack: Stacked) -> Sequence[Tensor]:
    """The diagonal of each problem's H; ones if no token came to it."""
    diagonal_BI = stack.hessians.diagonal(dim1=1, dim2=2)
    return torch.where((diagonal_BI > 0).any(-1, keepdim=True), diagonal_BI, 1.0).unbind()


@dataclass(frozen=True)
class _Grid:
    """The searched scales of a problem's weights.

    ``scale_OG`` are stored (see ``codes.Float4Weight`` and ``Mxfp8Weight``); ``divisors`` is each weight's global scale
    (nvfp4; of others None), and ``divisor_O1`` each row's.
    """

    scheme: MicroscalingScheme
    problem: Problem
    scale_OG: Tensor
    divisors: Sequence[Tensor | None]
    divisor_O1: Tensor | None

    @classmethod
    def of(
        cls, scheme: MicroscalingScheme, problem: Problem, importance_I: Tensor | None, *, tensor_scales: bool
    ) -> _Grid:
        """Search the scales.

        nvfp4 shares a global scale where runtimes fuse weights; without ``tensor_scales`` it is 1.
        """
        w_OI, weights = problem.matrix_OI, problem.weights
        if scheme.type != "nvfp4":
            scale_OG = microscaling.mx_exponents(w_OI, importance_I, NEAREST[scheme.type])
            return cls(scheme, problem, scale_OG, [None] * len(weights), None)
        if tensor_scales:
            largest = _fused_maxima({w.module: m for w, m in zip(weights, _matrices(problem), strict=True)})
            divisors = [microscaling.nvfp4_global_scale(largest[weight.module]) for weight in weights]
        else:
            divisors = [torch.ones(1, device=w_OI.device)] * len(weights)
        rows = [divisor.expand(weight.shape_OI[0]) for weight, divisor in zip(weights, divisors, strict=True)]
        divisor_O1 = torch.cat(rows)[:, None]
        scale_OG = microscaling.nvfp4_scales(w_OI, divisor_O1, importance_I)
        return cls(scheme, problem, scale_OG, divisors, divisor_O1)

    @property
    def scales(self) -> Tensor:
        """What values are multiplied with, float32 [O, G]."""
        return microscaling.effective_scales(self.scale_OG, self.divisor_O1)

    def rounded(self) -> list[Float4Weight | Mxfp8Weight]:
        """Each weight, rounded to nearest."""
        nearest = microscaling.nearest8 if self.scheme.type == "mxfp8" else microscaling.nearest4
        return self._split(nearest(self.problem.matrix_OI, self.scale_OG, self.divisor_O1))

    def with_values(self, values_OI: Tensor) -> list[Float4Weight | Mxfp8Weight]:
        """Each weight, of values of the grid, given as floats."""
        mxfp8 = self.scheme.type == "mxfp8"
        return self._split(values_OI.to(torch.float8_e4m3fn) if mxfp8 else microscaling.codes_of(values_OI))

    def _split(self, codes_OI: Tensor) -> list[Float4Weight | Mxfp8Weight]:
        sizes = [weight.shape_OI[0] for weight in self.problem.weights]
        parts = zip(torch.split(codes_OI, sizes), torch.split(self.scale_OG, sizes), self.divisors, strict=True)
        if self.scheme.type == "mxfp8":
            return [Mxfp8Weight(codes, scale) for codes, scale, _ in parts]
        return [Float4Weight(codes, scale, divisor) for codes, scale, divisor in parts]


def _fused_maxima(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest magnitude, by module, of all that runtimes fuse it with: they keep one scale for the whole."""
    largest: dict[str, Tensor] = {}
    for members in together(matrices):
        ends = [end for module in members for end in torch.aminmax(matrices[module])]
        largest |= dict.fromkeys(members, torch.stack(ends).abs().amax())
    return largest


def _input_global_scale(scheme: MicroscalingScheme, problem: Problem) -> tuple[Tensor | None, tuple[str, ...]]:
    """The scale that divides the scales of an input's groups, float32 [1]; None if the scheme has none."""
    if scheme.type != "nvfp4" or scheme.activations == "none":
        return None, ()
    statistics = problem.statistics
    if statistics is None or statistics.count == 0:
        note = f"global scale of its input 1, for no calibration token came to it: {problem.weights[0].module}"
        return torch.ones(1, device=problem.matrix_OI.device), (note,)
    return microscaling.nvfp4_global_scale(statistics.abs_max_I.amax()), ()


def _matrices(problem: Problem) -> Sequence[Tensor]:
    return torch.split(problem.matrix_OI, [weight.shape_OI[0] for weight in problem.weights])
