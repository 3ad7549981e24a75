"""Linear layers: from a layer's weights and statistics to codes, for every method of our own.

What shares an input is solved as one problem (q, k, v; gate, up), and the experts of a layer are stacked.
B problems, O output features, I input features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.codes import CodedWeight, Float4Weight, Float8Weight, IntWeight
from workers.errors import NumericalError
from workers.loading import QuantizableWeight
from workers.methods.factors import Factors
from workers.numerics import awq, fp4, fp8, gptq, hqq, refine, rounding
from workers.recipes import (
    AwqRecipe,
    Float8Scheme,
    GptqRecipe,
    HqqRecipe,
    IntScheme,
    LinearRecipe,
    LinearScheme,
    MicroscalingScheme,
)
from workers.statistics import InputStatistics

# Elements of the weights that are stacked into one problem: bounds the memory of a layer with many experts.
STACKED_ELEMENTS = 1 << 26
FLOAT16_SCALES = ("gptq", "gptq-v2", "awq")


@dataclass(frozen=True)
class Coded:
    """The codes of one weight, and what had to be done otherwise than the recipe says."""

    weight: QuantizableWeight
    codes: CodedWeight
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Problem:
    """Weights with one input and one scheme, their rows stacked."""

    weights: tuple[QuantizableWeight, ...]
    scheme: LinearScheme
    matrix_OI: Tensor
    statistics: InputStatistics | None


@dataclass(frozen=True)
class Layer:
    """What a method sees of a layer.

    ``read`` gives a weight as float [O, I]; ``statistics`` those of its input; ``dtype`` is the checkpoint's.
    """

    read: Callable[[QuantizableWeight], Tensor]
    statistics: Callable[[QuantizableWeight], InputStatistics | None]
    dtype: torch.dtype
    factors: Factors


def code_layer(
    recipe: LinearRecipe, weights: Sequence[tuple[QuantizableWeight, LinearScheme]], layer: Layer
) -> Iterator[Coded]:
    """Codes for the weights of one layer.

    Raises:
        NumericalError: NaN or Inf in a weight, or statistics that no damping mends.
    """
    for batch in _batches(_problems(weights, layer)):
        yield from _code(recipe, batch, layer)


def _problems(weights: Sequence[tuple[QuantizableWeight, LinearScheme]], layer: Layer) -> Iterator[_Problem]:
    together: dict[tuple[object, LinearScheme], list[QuantizableWeight]] = {}
    for weight, scheme in weights:
        found = layer.statistics(weight)
        # Experts that share statistics stay problems of their own: they are stacked as far as memory goes.
        name: object = weight.key if found is None else (id(found), weight.input[1])
        together.setdefault((name, scheme), []).append(weight)
    for (_, scheme), group in together.items():
        matrices = [require_finite(weight.key, layer.read(weight)) for weight in group]
        yield _Problem(tuple(group), scheme, torch.cat(matrices), layer.statistics(group[0]))


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        NumericalError: it holds NaN or Inf.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"weights: NaN or Inf in {key}; the checkpoint is broken, fetch it again")
    return tensor


def _batches(problems: Iterable[_Problem]) -> Iterator[list[_Problem]]:
    """Problems of one shape one after the other, experts stacked as far as the memory for it goes."""
    batch: list[_Problem] = []
    for problem in problems:
        fits = (
            batch
            and problem.weights[0].input[1] is not None
            and problem.matrix_OI.shape == batch[0].matrix_OI.shape
            and problem.scheme == batch[0].scheme
            and len(problem.weights) == len(batch[0].weights)
            and (len(batch) + 1) * problem.matrix_OI.numel() <= STACKED_ELEMENTS
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(problem)
    if batch:
        yield batch


def _code(recipe: LinearRecipe, batch: list[_Problem], layer: Layer) -> Iterator[Coded]:
    match batch[0].scheme:
        case IntScheme() as scheme:
            yield from _code_int(recipe, scheme, batch, layer)
        case Float8Scheme() as scheme:
            for problem in batch:
                yield from _code_fp8(scheme, problem, layer)
        case MicroscalingScheme() as scheme:
            for problem in batch:
                yield from _code_fp4(scheme, problem)


# ------------------------------------------------------------------------------------------- integers


def _code_int(recipe: LinearRecipe, scheme: IntScheme, batch: list[_Problem], layer: Layer) -> Iterator[Coded]:
    w_BOI = torch.stack([problem.matrix_OI for problem in batch])
    dtype = torch.float16 if recipe.format in FLOAT16_SCALES else layer.dtype
    notes: list[tuple[str, ...]] = [() for _ in batch]
    match recipe:
        case GptqRecipe():
            codes_BOI, scale_BOG, zero_BOG, notes = _gptq(recipe, scheme, batch, w_BOI, dtype, layer.factors)
        case AwqRecipe(options=options) if options.clip:
            scale_BOG, zero_BOG = awq.clipped_params(
                w_BOI, _stacked_hessians(batch), scheme.bits, scheme.group_size, symmetric=scheme.symmetric,
                scale_dtype=dtype,
            )  # fmt: skip
            codes_BOI = rounding.quantize(w_BOI, scale_BOG, zero_BOG, scheme.bits)
        case HqqRecipe(options=options):
            scale_BOG, zero_BOG = hqq.params(
                w_BOI, scheme.bits, scheme.group_size, scale_dtype=dtype, iterations=options.iterations,
                norm=options.norm,
            )  # fmt: skip
            codes_BOI = rounding.quantize(w_BOI, scale_BOG, zero_BOG, scheme.bits)
        case _:
            searched = getattr(recipe.options, "scales", "minmax") == "mse"
            params = rounding.mse_params if searched else rounding.minmax_params
            scale_BOG, zero_BOG = params(
                w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=dtype
            )
            codes_BOI = rounding.quantize(w_BOI, scale_BOG, zero_BOG, scheme.bits)
    for index, problem in enumerate(batch):
        zero_OG = None if zero_BOG is None else zero_BOG[index]
        yield from _split(problem, scheme, codes_BOI[index], scale_BOG[index], zero_OG, notes[index])


def _stacked_hessians(batch: list[_Problem]) -> Tensor:
    """H of each problem; zeros where nothing came in."""
    if len(batch) == 1 and batch[0].statistics is not None:
        return batch[0].statistics.gram_II[None]
    width = batch[0].matrix_OI.shape[1]
    unseen = batch[0].matrix_OI.new_zeros(width, width, dtype=torch.float32)
    return torch.stack([unseen if p.statistics is None else p.statistics.gram_II for p in batch])


def _gptq(
    recipe: GptqRecipe, scheme: IntScheme, batch: list[_Problem], w_BOI: Tensor, dtype: torch.dtype, factors: Factors
) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[str, ...]]]:
    options, h_BII = recipe.options, _stacked_hessians(batch)
    seen = tuple(problem.statistics for problem in batch if problem.statistics is not None)
    importance_BI = h_BII.diagonal(dim1=1, dim2=2) if options.scales == "mse" else None
    search = rounding.minmax_params if importance_BI is None else rounding.mse_params
    weighing = {} if importance_BI is None else {"importance_I": _nonzero(importance_BI)}
    scale_BOG, zero_BOG = search(
        w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=dtype, **weighing
    )
    try:
        if len(seen) == len(batch):
            factor = factors.of(seen, h_BII, activation_order=options.activation_order, damping=options.damping)
        else:
            factor = gptq.factorize(h_BII, activation_order=options.activation_order, damping=options.damping)
    except gptq.NotPositiveDefinite as error:
        raise NumericalError(f"gptq: {batch[0].weights[0].key}: {error}; calibrate on other text") from error
    codes_BOI = gptq.solve(w_BOI, factor, scale_BOG, zero_BOG, bits=scheme.bits)
    if options.refine:
        codes_BOI, scale_BOG = refine.refine(
            w_BOI, h_BII, codes_BOI, scale_BOG, zero_BOG, bits=scheme.bits, rounds=options.refine,
            damping=options.damping,
        )  # fmt: skip
    notes = [_notes(recipe, problem, used) for problem, used in zip(batch, factor.damping_B, strict=True)]
    return codes_BOI, scale_BOG, zero_BOG, notes


def _nonzero(importance_BI: Tensor) -> Tensor:
    """Equal importance for inputs that nothing ever came to."""
    return torch.where((importance_BI > 0).any(-1, keepdim=True), importance_BI, 1.0)


def _notes(recipe: GptqRecipe, problem: _Problem, damping: float) -> tuple[str, ...]:
    wanted, name, said = recipe.options.damping, problem.weights[0].module, []
    if damping > wanted:
        said.append(f"damping raised from {wanted:g} to {damping:g} for {name}: H wasn't positive definite")
    if problem.statistics is None or problem.statistics.count == 0:
        said.append(f"rounded to nearest, for no calibration token came to it: {name}")
    return tuple(said)


def _split(
    problem: _Problem,
    scheme: IntScheme,
    codes_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    notes: tuple[str, ...],
) -> Iterator[Coded]:
    """The stacked rows back to the weights they came from."""
    sizes = [weight.shape_OI[0] for weight in problem.weights]
    zeros = [None] * len(sizes) if zero_OG is None else torch.split(zero_OG, sizes)
    parts = zip(problem.weights, torch.split(codes_OI, sizes), torch.split(scale_OG, sizes), zeros, strict=True)
    for index, (weight, codes, scale, zero) in enumerate(parts):
        coded = IntWeight(codes, scale, zero, scheme.bits, scheme.group_size)
        yield Coded(weight, coded, notes if index == 0 else ())


# ------------------------------------------------------------------------------------------- floats


def _code_fp8(scheme: Float8Scheme, problem: _Problem, layer: Layer) -> Iterator[Coded]:
    input_scale: Tensor | None = None
    notes: tuple[str, ...] = ()
    if scheme.activations == "static":
        input_scale, notes = _input_scale(problem, layer.dtype)
    dtype = torch.float32 if scheme.scales == "block" else layer.dtype
    for weight, matrix_OI in zip(problem.weights, _matrices(problem), strict=True):
        values_OI, scale = fp8.quantize(matrix_OI, scheme.scales, scale_dtype=dtype)
        coded = Float8Weight(values_OI, scale, blocks=scheme.scales == "block", input_scale=input_scale)
        yield Coded(weight, coded, notes)


def _input_scale(problem: _Problem, dtype: torch.dtype) -> tuple[Tensor, tuple[str, ...]]:
    statistics = problem.statistics
    if statistics is None or statistics.count == 0:
        name = problem.weights[0].module
        scale = fp8.input_scale(torch.ones(1, device=problem.matrix_OI.device)).to(dtype)
        return scale, (f"activation scale of 1/448, for no calibration token came to it: {name}",)
    return fp8.input_scale(statistics.abs_max_I.amax().reshape(1)).to(dtype), ()


def _code_fp4(scheme: MicroscalingScheme, problem: _Problem) -> Iterator[Coded]:
    for weight, matrix_OI in zip(problem.weights, _matrices(problem), strict=True):
        if scheme.type == "mxfp4":
            codes_OI, exponent_OG = fp4.mxfp4(matrix_OI)
            yield Coded(weight, Float4Weight(codes_OI, exponent_OG, None))
        else:
            yield Coded(weight, Float4Weight(*fp4.nvfp4(matrix_OI)))


def _matrices(problem: _Problem) -> Sequence[Tensor]:
    return torch.split(problem.matrix_OI, [weight.shape_OI[0] for weight in problem.weights])
