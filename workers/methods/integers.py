"""Integer recipes (rtn, gptq): from a layer's weights and statistics to codes.

What shares an input is solved as one problem (q, k, v; gate, up), and the experts of a layer are stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.codes import IntWeight
from workers.errors import NumericalError, UnsupportedRecipe
from workers.loading import QuantizableWeight
from workers.numerics import gptq, rounding
from workers.recipes import GptqRecipe, IntScheme, RtnRecipe
from workers.statistics import InputStatistics

# Elements of the weights that are stacked into one problem: bounds the memory of a layer with many experts.
STACKED_ELEMENTS = 1 << 26
SCALE_DTYPES = {"gptq": torch.float16}


@dataclass(frozen=True)
class Solved:
    """The codes of one weight, and what had to be done otherwise than the recipe says."""

    weight: QuantizableWeight
    codes: IntWeight
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class _Problem:
    """Weights with one input and one scheme, their rows stacked."""

    weights: tuple[QuantizableWeight, ...]
    scheme: IntScheme
    matrix_OI: Tensor
    statistics: InputStatistics | None


def schemes_of(recipe: GptqRecipe | RtnRecipe, weights: Iterable[QuantizableWeight]) -> dict[str, IntScheme]:
    """What each weight that the recipe quantizes is quantized to, by checkpoint key; deviations by width included.

    Raises:
        UnsupportedRecipe: nothing is left to quantize, or a width that the group size doesn't divide is refused.
    """
    found = {}
    for weight in weights:
        scheme = None if recipe.ignores(weight.module) else _scheme_of(recipe, weight)
        if scheme is not None:
            found[weight.key] = scheme
    if not found:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)}; shorten it"
        )
    return found


def _scheme_of(recipe: GptqRecipe | RtnRecipe, weight: QuantizableWeight) -> IntScheme | None:
    scheme, width = recipe.scheme, weight.shape_OI[1]
    if scheme.group_size is None or width % scheme.group_size == 0:
        return scheme
    match scheme.indivisible:
        case "channel":
            return scheme.model_copy(update={"group_size": None})
        case "keep":
            return None
        case _:
            raise UnsupportedRecipe(
                f"recipe {recipe.name!r}: group size {scheme.group_size} doesn't divide the width {width} of "
                f"{weight.module}; set scheme.group_size to a divisor or null, or scheme.indivisible to channel or keep"
            )


def deviations(
    recipe: GptqRecipe | RtnRecipe, weights: Iterable[QuantizableWeight], schemes: dict[str, IntScheme]
) -> list[str]:
    """What is done otherwise than the recipe says because of a layer's width, a line for each layer."""
    size = recipe.scheme.group_size
    found = []
    for weight in weights:
        scheme, width = schemes.get(weight.key), weight.shape_OI[1]
        if recipe.ignores(weight.module) or scheme == recipe.scheme:
            continue
        what = "left in half precision" if scheme is None else "one scale for each output"
        found.append(f"{what}, for the group size {size} doesn't divide the width {width}: {weight.module}")
    return found


def solve_layer(
    recipe: GptqRecipe | RtnRecipe,
    weights: Sequence[tuple[QuantizableWeight, IntScheme]],
    read: Callable[[QuantizableWeight], Tensor],
    statistics: Callable[[QuantizableWeight], InputStatistics | None],
) -> Iterator[Solved]:
    """Solve the weights of one layer; ``read`` gives a weight as [O, I] in the checkpoint's dtype.

    Raises:
        NumericalError: NaN or Inf in a weight, or statistics that no damping mends.
    """
    for batch in _batches(_problems(weights, read, statistics)):
        yield from _solve(recipe, batch)


def _problems(
    weights: Sequence[tuple[QuantizableWeight, IntScheme]],
    read: Callable[[QuantizableWeight], Tensor],
    statistics: Callable[[QuantizableWeight], InputStatistics | None],
) -> Iterator[_Problem]:
    together: dict[tuple[int | str, IntScheme], list[QuantizableWeight]] = {}
    for weight, scheme in weights:
        found = statistics(weight)
        together.setdefault((weight.key if found is None else id(found), scheme), []).append(weight)
    for (_, scheme), group in together.items():
        matrices = [require_finite(weight.key, read(weight)) for weight in group]
        yield _Problem(tuple(group), scheme, torch.cat(matrices), statistics(group[0]))


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
            and (len(batch) + 1) * problem.matrix_OI.numel() <= STACKED_ELEMENTS
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(problem)
    if batch:
        yield batch


def _solve(recipe: GptqRecipe | RtnRecipe, batch: list[_Problem]) -> Iterator[Solved]:
    scheme = batch[0].scheme
    w_BOI = torch.stack([problem.matrix_OI for problem in batch])
    dtype = SCALE_DTYPES.get(recipe.format, w_BOI.dtype)
    params = rounding.mse_params if recipe.options.scales == "mse" else rounding.minmax_params
    scale_BOG, zero_BOG = params(w_BOI, scheme.bits, scheme.group_size, symmetric=scheme.symmetric, scale_dtype=dtype)
    if isinstance(recipe, RtnRecipe):
        codes_BOI = rounding.quantize(w_BOI, scale_BOG, zero_BOG, scheme.bits)
        notes: list[tuple[str, ...]] = [() for _ in batch]
    else:
        codes_BOI, notes = _gptq(recipe, batch, w_BOI, scale_BOG, zero_BOG)
    for index, problem in enumerate(batch):
        zero_OG = None if zero_BOG is None else zero_BOG[index]
        yield from _split(problem, codes_BOI[index], scale_BOG[index], zero_OG, notes[index])


def _gptq(
    recipe: GptqRecipe, batch: list[_Problem], w_BOI: Tensor, scale_BOG: Tensor, zero_BOG: Tensor | None
) -> tuple[Tensor, list[tuple[str, ...]]]:
    width = w_BOI.shape[-1]
    unseen = w_BOI.new_zeros(width, width, dtype=torch.float32)
    h_BII = torch.stack([unseen if p.statistics is None else p.statistics.gram_II for p in batch])
    options = recipe.options
    try:
        solution = gptq.solve(
            w_BOI,
            h_BII,
            scale_BOG,
            zero_BOG,
            bits=batch[0].scheme.bits,
            activation_order=options.activation_order,
            damping=options.damping,
        )
    except gptq.NotPositiveDefinite as error:
        raise NumericalError(f"gptq: {batch[0].weights[0].key}: {error}; calibrate on other text") from error
    notes: list[tuple[str, ...]] = []
    for problem, damping in zip(batch, solution.damping_B, strict=True):
        name, said = problem.weights[0].module, []
        if damping > options.damping:
            said.append(
                f"damping raised from {options.damping:g} to {damping:g} for {name}: H wasn't positive definite"
            )
        if problem.statistics is None or problem.statistics.count == 0:
            said.append(f"rounded to nearest, for no calibration token came to it: {name}")
        notes.append(tuple(said))
    return solution.codes_BOI, notes


def _split(
    problem: _Problem, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, notes: tuple[str, ...]
) -> Iterator[Solved]:
    """The stacked rows back to the weights they came from."""
    sizes = [weight.shape_OI[0] for weight in problem.weights]
    scheme = problem.scheme
    zeros = [None] * len(sizes) if zero_OG is None else torch.split(zero_OG, sizes)
    parts = zip(problem.weights, torch.split(codes_OI, sizes), torch.split(scale_OG, sizes), zeros, strict=True)
    for index, (weight, codes, scale, zero) in enumerate(parts):
        solved = IntWeight(codes, scale, zero, scheme.bits, scheme.group_size)
        yield Solved(weight, solved, notes if index == 0 else ())
