"""The compressed-tensors format, ``pack-quantized``: symmetric integer weights, as llm-compressor and vLLM use it.

Shapes: O output features, I input features, G groups of input columns (1 for a scale per output channel).
Specification: ``compressed_tensors.compressors.pack_quantized`` (0.20).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import Header
from workers.codes import IntWeight
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.numerics.packing import pack_to_int32, unpack_from_int32
from workers.recipes import IntScheme

FORMAT = "pack-quantized"
ANCHORS = ("weight_packed",)
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
# A weight of one expert; transformers fuses them into one tensor for each layer while it loads.
EXPERT = re.compile(r"\.experts\.\d+\.")


def encode(weight: IntWeight) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight_packed`` int32 (O, ceil(I * bits / 32)); ``weight_scale`` (O, G) in the dtype it has; ``weight_shape``
    int64 (2,).
    """
    assert weight.zero_OG is None, "recipes.format_holds refuses asymmetric schemes for this format"
    return {
        "weight_packed": pack_to_int32(weight.codes_OI, weight.bits),
        "weight_scale": weight.scale_OG.contiguous(),
        "weight_shape": torch.tensor(weight.codes_OI.shape),
    }


def header(stored: Mapping[str, Header], read: Callable[[str], Tensor]) -> Header:
    """Return shape and dtype of what :func:`decode` gives; ``read`` reads a stored tensor by its name."""
    rows, columns = read("weight_shape").tolist()
    return Header((rows, columns), stored["weight_scale"].dtype)


def decode(stored: Mapping[str, Tensor], bits: int) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), in the dtype of the scales, as the library does.

    Raises:
        CheckpointError: more or fewer words than ``bits`` asks for.
    """
    scale_OG = stored["weight_scale"]
    rows, columns = (int(size) for size in stored["weight_shape"])
    check_words(stored["weight_packed"].shape[1], columns, bits)
    codes_OI = unpack_from_int32(stored["weight_packed"], bits, (rows, columns)).to(scale_OG.dtype)
    return (codes_OI.view(rows, scale_OG.shape[1], -1) * scale_OG[:, :, None]).view(rows, columns)


def check_words(words: int, codes: int, bits: int) -> None:
    """Refuse a width that doesn't fit what is stored.

    Raises:
        CheckpointError: naming both.
    """
    expected = -(-codes * bits // 32)
    if words != expected:
        raise CheckpointError(
            f"{codes} codes stored in {words} words, expected {expected} for the {bits} bits that config.json declares"
        )


def quantization_config(
    schemes: Mapping[str, IntScheme], kept: Iterable[str], conv1d: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    ``schemes`` is what each quantized module got, fallbacks included; ``kept`` are the Linear modules left as they are
    (where a module and its checkpoint key differ in name, both names); ``conv1d`` are those of ``schemes`` that are
    transformers' Conv1D.

    Raises:
        UnsupportedRecipe: Conv1D modules; experts that don't all share one scheme.
    """
    kept = sorted(set(kept))
    _refuse_conv1d(list(conv1d))
    base = Counter(schemes.values()).most_common(1)[0][0]
    _refuse_uneven_experts([name for name, scheme in schemes.items() if scheme != base] + kept, schemes)
    # "Linear" comes first: with dequantize=True transformers decodes every module by the first group.
    groups = [{"targets": ["Linear"], "weights": _arguments(base)}]
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != base:
            names = sorted(name for name, own in schemes.items() if own == scheme)
            groups.append({"targets": names, "weights": _arguments(scheme)})
    return {
        "config_groups": {
            f"group_{number}": {**group, "input_activations": None, "output_activations": None, "format": FORMAT}
            for number, group in enumerate(groups)
        },
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": kept,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": importlib.metadata.version("compressed-tensors"),
    }


def declared_bits(config: Mapping[str, Any], module: str) -> int:
    """Return the bit width that config.json's ``quantization_config`` declares for a module.

    Raises:
        UnsupportedRecipe: no group targets it, or the group is not symmetric pack-quantized integers.
    """
    groups = list(config["config_groups"].values())
    exact = [group for group in groups if module in group["targets"]]
    matched = [group for group in groups if any(_matches(target, module) for target in group["targets"])]
    by_class = [group for group in groups if "Linear" in group["targets"]]
    for group in exact + matched + by_class:
        weights = group["weights"]
        stored_as = group.get("format") or config["format"]
        if stored_as != FORMAT or weights["type"] != "int" or not weights["symmetric"]:
            kind = {"format": stored_as, **{name: weights[name] for name in ("type", "num_bits", "symmetric")}}
            raise UnsupportedRecipe(f"{module}: can't decode {kind}; only symmetric int as {FORMAT!r} is known")
        return int(weights["num_bits"])
    raise UnsupportedRecipe(f"{module}: packed, but no config group targets it: {[g['targets'] for g in groups]}")


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _arguments(scheme: IntScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
        "observer": "minmax",
    }


def _refuse_conv1d(modules: list[str]) -> None:
    if modules:
        raise UnsupportedRecipe(
            f"compressed-tensors: {some(modules)} are Conv1D, which transformers doesn't load in this format; "
            "choose method: bitsandbytes"
        )


def _refuse_uneven_experts(uneven: list[str], schemes: Mapping[str, IntScheme]) -> None:
    # transformers 5.23 decodes all experts by one group while it fuses them, and drops those that aren't packed.
    experts = [name for name in uneven if EXPERT.search(name)]
    if experts:
        widths = sorted({scheme.group_size or 0 for scheme in schemes.values()})
        raise UnsupportedRecipe(
            f"compressed-tensors: the experts {some(experts)} deviate from the other modules (group sizes {widths}, "
            "0: a whole row; or left as they are); transformers loads experts only if all share the common scheme; "
            "choose a group_size that divides their width, don't ignore them, or choose method: bitsandbytes"
        )


def some(names: list[str]) -> str:
    """Name the first few of many modules."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
