"""The libraries that make whole artifacts by a recipe's ``engine``, and what each can make. No torch.

A library without a row is in ``REFUSED``, with the reason, which a zoo that names it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, WithJsonSchema

from workers.spec.base import meant
from workers.spec.formats import AWQ, COMPRESSED_TENSORS, GPTQ
from workers.spec.schemes import Float8Scheme, IntScheme, MicroscalingScheme, Scheme


class Makes(NamedTuple):
    """What a library makes by one method: schemes in a format, and which of ``LibraryOptions`` it takes."""

    format: str
    holds: Callable[[Scheme], bool]
    says: str
    options: frozenset[str] = frozenset()
    calibrated: bool = True


def _ints(*bits: int, zero_points: bool = True) -> Callable[[Scheme], bool]:
    """Integers of these bits in groups, without rounding of activations."""

    def holds(scheme: Scheme) -> bool:
        if not isinstance(scheme, IntScheme) or scheme.activations != "none" or scheme.indivisible != "refuse":
            return False
        return scheme.bits in bits and (zero_points or scheme.symmetric)

    return holds


def _llmcompressor_rounds(scheme: Scheme) -> bool:
    match scheme:
        case (
            MicroscalingScheme(type="nvfp4", activations="none") | Float8Scheme(scales="channel", activations="dynamic")
        ):
            return True
    return _ints(4, 8, zero_points=False)(scheme)


def _modelopt_rounds(scheme: Scheme) -> bool:
    match scheme:
        case MicroscalingScheme(type="nvfp4", activations="none") | Float8Scheme(scales="tensor", activations="static"):
            return True
    return False


def _autoawq_holds(scheme: Scheme) -> bool:
    return _ints(4)(scheme) and isinstance(scheme, IntScheme) and not scheme.symmetric and bool(scheme.group_size)


SOLVED = frozenset({"damping", "activation_order"})

LIBRARIES: dict[str, dict[str, Makes]] = {
    "gptqmodel": {
        "gptq": Makes(GPTQ.name, _ints(2, 3, 4, 8), "int of 2, 3, 4 or 8 bits, symmetric or not", SOLVED),
    },
    "llmcompressor": {
        "gptq": Makes(COMPRESSED_TENSORS.name, _ints(4, 8, zero_points=False), "int of 4 or 8 bits, symmetric", SOLVED),
        "rtn": Makes(
            COMPRESSED_TENSORS.name,
            _llmcompressor_rounds,
            "int of 4 or 8 bits, symmetric, nvfp4 weights, and fp8 with scales: channel and activations: dynamic",
            calibrated=False,
        ),
    },
    "auto-round": {
        "autoround": Makes(
            GPTQ.name, _ints(2, 3, 4, 8), "int of 2, 3, 4 or 8 bits, symmetric or not", frozenset({"iterations"})
        ),
    },
    "modelopt": {
        "rtn": Makes(
            COMPRESSED_TENSORS.name,
            _modelopt_rounds,
            "nvfp4 weights, and fp8 with scales: tensor and activations: static",
            calibrated=False,
        ),
    },
    "autoawq": {
        "awq": Makes(AWQ.name, _autoawq_holds, "int of 4 bits with zero points in groups"),
    },
    "auto-gptq": {
        "gptq": Makes(GPTQ.name, _ints(2, 3, 4, 8), "int of 2, 3, 4 or 8 bits, symmetric or not", SOLVED),
    },
}

# Archived libraries know the types of models (model_type) of their time alone: those that were quantized, verified and
# read by transformers 5.23. Of others autoawq stores scales of activations, which no runtime reads (gpt_neox, falcon),
# or divides norms that multiply by one more than their weight (gemma), which aren't recorded.
TYPES: dict[str, tuple[str, ...]] = {
    "autoawq": ("cohere", "llama", "mistral", "phi3", "qwen2", "qwen3", "stablelm"),
    "auto-gptq": ("bloom", "gemma", "gpt_neox", "llama", "mistral", "opt", "qwen2"),
}

# Libraries that are no engines, and what there is instead; the versions are those that were tried.
REFUSED: dict[str, str] = {
    "torchao": "it quantizes through transformers: method: transformers, recipes torchao-*, which need no environment "
    "of their own",
    "hqq": "transformers 5.23 doesn't implement it, and hqq 0.2.8 saves .pt files that no runtime reads; method: hqq "
    "without an engine puts its zero points into the formats that runtimes read",
    "quanto": "optimum-quanto 0.2.7 isn't serializable through transformers 5.23, and reloading its own qint8 file "
    "ends the process; rtn-w4-g128, torchao-int8wo and torchao-float8wo have the same bits",
    "aqlm": "aqlm 1.1.7 has kernels that load, and no quantizer; name a published checkpoint to quantmill verify",
}


def _library(name: str) -> str:
    if reason := REFUSED.get(name):
        raise ValueError(f"engine {name!r} can't be used: {reason}")
    if name not in LIBRARIES:
        raise ValueError(
            f"unknown engine, got {name!r}; {meant(name, LIBRARIES)}Known are {', '.join(LIBRARIES)}; name one, or "
            "leave engine out for quantmill's own"
        )
    return name


LibraryName = Annotated[
    str, AfterValidator(_library), WithJsonSchema({"type": "string", "enum": list(LIBRARIES), "title": "Engine"})
]


def check_makes(recipe: str, engine: str, method: str, fmt: str, scheme: Scheme, options: dict[str, object]) -> None:
    """Refuse what a library doesn't make; ``options`` are those that differ from their defaults.

    Raises:
        ValueError: names the field, the value, and what the library makes.
    """
    made = LIBRARIES[engine]
    row = made.get(method)
    if row is None:
        raise ValueError(
            f"recipe {recipe!r}: engine {engine!r} has no method {method!r}; choose method: {' or '.join(made)}"
        )
    if fmt != row.format:
        raise ValueError(
            f"recipe {recipe!r}: engine {engine!r} doesn't write the format {fmt!r}; choose format: {row.format}"
        )
    if not row.holds(scheme):
        raise ValueError(
            f"recipe {recipe!r}: engine {engine!r} doesn't make the scheme {scheme.model_dump_json()} by method "
            f"{method!r} (it makes {row.says}); choose such a scheme, or leave engine out"
        )
    if unknown := sorted(set(options) - row.options):
        takes = f"it takes {', '.join(sorted(row.options))}" if row.options else "it takes none"
        raise ValueError(
            f"recipe {recipe!r}: options.{unknown[0]}: engine {engine!r} doesn't take it by method {method!r} "
            f"({takes}); remove it"
        )
