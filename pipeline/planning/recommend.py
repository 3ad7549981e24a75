"""Which recipe to choose: rules of the field, replaced by what was measured of the recipes where there is something.

Pure. Bytes of the rules are those of weights alone, as if all of a model's parameters were in its layers; the plan has
the exact size of a model. KL in nats for each token.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from workers.spec.base import Frozen
from workers.spec.formats import FORMATS
from workers.spec.ggml import FILE_TYPES
from workers.spec.layers import LayerKinds
from workers.spec.recipes import BitsAndBytesRecipe, KeepRecipe, LibraryRecipe, Recipe, TransformersRecipe
from workers.spec.runtimes import checking, runtime_named
from workers.spec.schemes import FourBitFloatScheme, GgmlScheme, GgufScheme, LlmInt8Scheme, Scheme
from workers.spec.tensors import TensorHeader

Use = Literal["inference", "qlora", "production"]

# Share of the memory that weights may take; the rest is for activations, cache and the library's buffers.
SHARE_FOR_WEIGHTS = 0.9
# A matrix of the size that large models have, of which bits for each weight are computed.
TYPICAL = TensorHeader("weight", (4096, 4096), "BF16")
# Without calibration, codes of 4 bits or less lose about twice as much (FIELD: 0.157 against 0.077, group of 32).
CALIBRATED = 0.5


class HasKl(Protocol):
    """What was measured of an artifact: ``Metrics`` of a manifest, or those of results.json."""

    @property
    def kl_mean(self) -> float:
        """Mean KL from the reference, in nats for each token."""


class Rule(NamedTuple):
    """What to expect of a family of schemes: KL of a model of 8 billion parameters, and the share of scores kept."""

    kl: float
    retention: tuple[float, float]


# KL of integers: llama.cpp's k-quants of Llama-3-8B, with an importance matrix. Retention of int8, nf4 and fp4: the
# field's figures. The others are placed between these by their bits and mantissas.
RULES: dict[str, Rule] = {
    "w8": Rule(0.0014, (0.99, 1.0)),
    "llm-int8": Rule(0.002, (0.99, 1.0)),
    "w8a8": Rule(0.003, (0.99, 1.0)),
    "w7": Rule(0.003, (0.99, 1.0)),
    "w6": Rule(0.0055, (0.99, 1.0)),
    "fp8": Rule(0.006, (0.985, 1.0)),
    "mxfp8": Rule(0.006, (0.985, 1.0)),
    "w5": Rule(0.0108, (0.98, 0.995)),
    "w4": Rule(0.0313, (0.95, 0.985)),
    "nf4": Rule(0.04, (0.95, 0.98)),
    "nvfp4": Rule(0.04, (0.95, 0.98)),
    "fp4": Rule(0.08, (0.93, 0.96)),
    "mxfp4": Rule(0.08, (0.93, 0.96)),
    "w3": Rule(0.102, (0.85, 0.94)),
    "nvfp4-w4a4": Rule(0.11, (0.9, 0.95)),
    "mxfp4-w4a4": Rule(0.15, (0.88, 0.94)),
    "w2": Rule(0.445, (0.5, 0.8)),
}
EIGHT_BITS = ("w8", "w8a8", "llm-int8", "fp8", "mxfp8")
# Schemes of one size that calibration doesn't improve by its codes, or whose rule has it already.
BY_CALIBRATION = ("w4", "w3", "w2")


class Recommendation(Frozen):
    """One recipe for a model: bytes of its weights, what to expect of it, why, and where that is known from."""

    recipe: str
    bytes: int
    fits: bool
    kl_mean: float
    retention: tuple[float, float] | None
    why: str
    source: Literal["measured", "rule"]


@dataclass(frozen=True)
class _Rated:
    recipe: Recipe
    bytes: int
    kl: float
    measured: bool


def recommend(
    parameters: int,
    memory_bytes: int | None,
    runtime: str | None,
    use: Use,
    recipes: Sequence[Recipe],
    measured: Mapping[str, HasKl],
    sizes: Mapping[str, int] | None = None,
) -> list[Recommendation]:
    """The recipes that serve a use in a runtime (None: in any), best first; those that don't fit the memory last.

    ``measured`` is by the names of recipes, as are ``sizes``: bytes that are known better than by the rules. Rules are
    scaled by what was measured: where half of the measured recipes lose three times as much as their rules say, the
    others are expected to, too.

    Raises:
        ValueError: the runtime is unknown; the message names those that there are.
    """
    able = [recipe for recipe in recipes if _serves(recipe, use) and _is_read(recipe, runtime)]
    # What a library makes, and may want a GPU or a package for, only where it was seen to work.
    able = [
        recipe
        for recipe in able
        if not isinstance(recipe, TransformersRecipe | LibraryRecipe) or recipe.name in measured
    ]
    scale = _scale(able, measured)
    known = sizes or {}
    rated = [_rated(recipe, parameters, scale, measured.get(recipe.name), known.get(recipe.name)) for recipe in able]
    room = None if memory_bytes is None else int(SHARE_FOR_WEIGHTS * memory_bytes)
    best = sorted(rated, key=lambda one: _rank(one, use, room))
    return [_said(one, use, room, runtime) for one in best]


def _serves(recipe: Recipe, use: Use) -> bool:
    if isinstance(recipe, KeepRecipe) or recipe.scheme.family not in RULES:
        return False
    return use != "qlora" or trains(recipe)


def trains(recipe: Recipe) -> bool:
    """Whether adapters can be trained on the artifact, as bitsandbytes' layers pass gradients on."""
    return isinstance(recipe, BitsAndBytesRecipe)


def _is_read(recipe: Recipe, runtime: str | None) -> bool:
    if runtime is None:
        return True
    return runtime_named(runtime).reads(recipe.format, recipe.scheme, LayerKinds()) is None


def _scale(recipes: Sequence[Recipe], measured: Mapping[str, HasKl]) -> float:
    """Median of measured KL over the rule's; 1 if nothing was measured."""
    ratios = [measured[recipe.name].kl_mean / expected_kl(recipe) for recipe in recipes if recipe.name in measured]
    return statistics.median(ratios) if ratios else 1.0


def _rated(recipe: Recipe, parameters: int, scale: float, known: HasKl | None, size: int | None) -> _Rated:
    kl = scale * expected_kl(recipe) if known is None else known.kl_mean
    if size is None:
        size = round(parameters * bits_for_each_weight(recipe.scheme, recipe.format) / 8)
    return _Rated(recipe, size, kl, measured=known is not None)


def expected_kl(recipe: Recipe) -> float:
    """The rule's KL for a recipe, on a model of 8 billion parameters."""
    family = recipe.scheme.family
    uncalibrated = family in BY_CALIBRATION and not recipe.calibrated
    return RULES[family].kl / (CALIBRATED if uncalibrated else 1.0)


def bits_for_each_weight(scheme: Scheme, fmt: str) -> float:
    """Bits that a format stores for each weight of a large matrix, scales and zero points included."""
    held = GgmlScheme(kind=FILE_TYPES[scheme.mix].kind) if isinstance(scheme, GgufScheme) else scheme
    return 8 * sum(tensor.bytes for tensor in FORMATS[fmt].stored(held, TYPICAL)) / TYPICAL.numel


def _rank(one: _Rated, use: Use, room: int | None) -> tuple[bool, bool, float, int, str]:
    """What fits comes first, then what the use prefers, then the least loss, then the fewest bytes."""
    fits = room is None or one.bytes <= room
    size = one.bytes if fits else 0
    return (not fits, not _preferred(one.recipe, use), one.kl if fits else one.bytes, size, one.recipe.name)


def _preferred(recipe: Recipe, use: Use) -> bool:
    match use:
        case "qlora":
            return recipe.scheme.family == "nf4" and getattr(recipe.scheme, "double_quantization", False)
        case "production":
            return recipe.scheme.family in EIGHT_BITS
    return True


def _said(one: _Rated, use: Use, room: int | None, runtime: str | None) -> Recommendation:
    fits = room is None or one.bytes <= room
    return Recommendation(
        recipe=one.recipe.name,
        bytes=one.bytes,
        fits=fits,
        kl_mean=one.kl,
        retention=None if one.measured else RULES[one.recipe.scheme.family].retention,
        why=_why(one, use, fits, room, runtime),
        source="measured" if one.measured else "rule",
    )


def _why(one: _Rated, use: Use, fits: bool, room: int | None, runtime: str | None) -> str:
    low, high = RULES[one.recipe.scheme.family].retention
    kept = (
        f"KL {one.kl:.2g}, measured"
        if one.measured
        else f"keeps {100 * low:g} to {100 * high:g} % of the scores, by rule"
    )
    size = f"{one.bytes / 1e9:.2g} GB of weights"
    if room is not None:
        size += f", {'within' if fits else 'more than'} the {room / 1e9:.2g} GB that 90 % of the memory leaves for them"
    reader = runtime_named(runtime).name if runtime else checking(one.recipe.format).name
    return "; ".join([kept, size, *_for_use(one.recipe, use), f"read by {reader}"])


def _for_use(recipe: Recipe, use: Use) -> list[str]:
    if use == "production" and _preferred(recipe, use):
        return ["8 bits, which production prefers"]
    if use == "qlora":
        return ["NF4 with double quantization, as in QLoRA" if _preferred(recipe, use) else "trains adapters, too"]
    if isinstance(recipe.scheme, LlmInt8Scheme | FourBitFloatScheme):
        return ["adapters can be trained on it, too"]
    return []
