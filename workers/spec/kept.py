"""Sources that are quantized already: what their codes are, and which formats can hold them. Pure: no tensors.

``method: keep`` stores a source's integers, scales and zero points in another format. What a format would lose is said
before anything is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.spec.formats import AWQ, COMPRESSED_TENSORS, FORMATS, GGUF, GPTQ, GPTQ_V2, recognised
from workers.spec.layers import is_matrix_of_a_layer
from workers.spec.recipes import KeepRecipe
from workers.spec.schemes import GgmlScheme, GgufScheme, IntScheme
from workers.spec.tensors import TensorHeader

# Weights in a block of Q4_0 and of Q8_0.
BLOCK = 32
# Names of the stored tensors of a module that aren't its bias.
STORED = frozenset({
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
    "weight_g_idx",
})  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """A quantized source: its format, its modules' schemes, and its tensors as they are decoded."""

    format: str
    schemes: Mapping[str, IntScheme]
    tensors: tuple[TensorHeader, ...]


def read(config: Mapping[str, Any], tensors: Iterable[TensorHeader]) -> Kept | str:
    """What a ``quantization_config`` and the headers say of the codes; or why they can't be kept."""
    row = recognised(config)
    reader = None if row is None else _READERS.get(row.name)
    if row is None or reader is None:
        method = str(config.get("quant_method") or getattr(row, "name", None))[:40]
        return f"its codes are of the kind {method!r}, and those of {', '.join(_READERS)} can be kept"
    stored = _by_module(tensors)
    schemes: dict[str, IntScheme] = {}
    decoded: list[TensorHeader] = []
    done: set[str] = set()
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if module not in stored or leaf not in STORED:
            decoded.append(tensor)
        elif module not in done:
            done.add(module)
            found = reader(config, stored[module])
            if isinstance(found, str):
                return f"{module}: {found}"
            schemes[module], shape_OI, dtype = found
            decoded.append(TensorHeader(f"{module}.weight", shape_OI, dtype))
    if not schemes:
        return f"its config.json declares {row.name}, but none of its tensors is quantized in that format"
    return Kept(row.name, schemes, tuple(decoded))


def _by_module(tensors: Iterable[TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """The stored tensors of each quantized module."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if leaf in STORED:
            found.setdefault(module, {})[leaf] = tensor
    anchors = ("qweight", "weight_packed", "weight_scale")
    return {module: parts for module, parts in found.items() if any(anchor in parts for anchor in anchors)}


Found = tuple[IntScheme, tuple[int, int], str]


def _gptq(config: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> Found | str:
    bits, words, scales = config.get("bits"), stored.get("qweight"), stored.get("scales")
    if not isinstance(bits, int) or not 2 <= bits <= 8 or words is None or scales is None:
        return f"bits {bits!r} with the tensors {sorted(stored)}; expected bits from 2 to 8, and qweight with scales"
    if config.get("desc_act"):
        return (
            "desc_act: its columns' groups are in order of activation (g_idx), which no other format holds; name the "
            "original checkpoint"
        )
    return _scheme(
        words.shape[0] * 32 // bits, words.shape[1], scales, 0, bits, symmetric=bool(config.get("sym", True))
    )


def _awq(config: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> Found | str:
    bits, version = config.get("bits"), str(config.get("version") or config.get("format") or "gemm").lower()
    words, scales = stored.get("qweight"), stored.get("scales")
    if bits != 4 or version != "gemm" or words is None or scales is None:
        return f"version {version!r} with bits {bits!r}; expected 'gemm' with 4"
    return _scheme(words.shape[0], words.shape[1] * 8, scales, 0, 4, symmetric=False)


def _ct(config: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> Found | str:
    words, scales = stored.get("weight_packed"), stored.get("weight_scale")
    symmetric = "weight_zero_point" not in stored
    if words is None or scales is None or "weight_g_idx" in stored:
        return f"stored as {sorted(stored)}; only pack-quantized weights with scales by group can be kept"
    if config.get("kv_cache_scheme"):
        return "its keys and values have scales (kv_cache_scheme), which other formats don't hold"
    fitting: set[Found] = set()
    for group in config.get("config_groups", {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("input_activations") or weights.get("type") != "int":
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if not isinstance(bits, int) or weights.get("symmetric", True) is not symmetric:
            continue
        by_group = isinstance(size, int) and size > 0
        columns = scales.shape[1] * size if isinstance(size, int) and by_group else words.shape[1] * 32 // bits
        if words.shape[1] == -(-columns * bits // 32) and (by_group or scales.shape[1] == 1):
            found = _scheme(columns, words.shape[0], scales, 1, bits, symmetric=symmetric)
            fitting |= set() if isinstance(found, str) else {found}
    if len(fitting) != 1:
        return f"its {words.shape[1]} words for {scales.shape[1]} groups fit {len(fitting)} of its config_groups"
    return fitting.pop()


def _scheme(columns: int, rows: int, scales: TensorHeader, along: int, bits: int, *, symmetric: bool) -> Found | str:
    groups = scales.shape[along]
    if not groups or columns % groups:
        return f"{groups} groups for {columns} inputs"
    size = None if groups == 1 else columns // groups
    return IntScheme(bits=bits, group_size=size, symmetric=symmetric), (rows, columns), scales.dtype


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, TensorHeader]], Found | str]] = {
    GPTQ.name: _gptq,
    GPTQ_V2.name: _gptq,
    AWQ.name: _awq,
    COMPRESSED_TENSORS.name: _ct,
}
SOURCES = tuple(_READERS)


# ------------------------------------------------------------------------------------------------- targets


def stored_as(scheme: IntScheme, width: int, fmt: str) -> IntScheme | GgmlScheme | str:
    """The scheme under which a format holds codes of ``scheme`` exactly; or what it would lose.

    ``width`` divides the widths of all weights. Scales of wider groups are repeated.
    """
    size = scheme.group_size or width
    if fmt == GGUF.name:
        if not scheme.symmetric:
            return "the zero points, which Q4_0 and Q8_0 don't have"
        if size % BLOCK:
            return f"the scales of groups of {size}, which blocks of {BLOCK} would mix"
        return GgmlScheme(kind="q4_0" if scheme.bits <= 4 else "q8_0")
    row = FORMATS[fmt]
    wanted = scheme.model_copy(update={"indivisible": "refuse"})
    if not row.holds(wanted) and scheme.symmetric:
        wanted = wanted.model_copy(update={"symmetric": False})  # the zero points are all the same
    if not row.holds(wanted):
        bare = row.holds(scheme.model_copy(update={"symmetric": True}))
        return "the zero points, for it holds symmetric codes alone" if bare else f"the codes of {scheme.bits} bits"
    if row.group_sizes is None or scheme.group_size in row.group_sizes:
        return wanted
    smaller = [known for known in row.group_sizes if known is not None and known <= size and size % known == 0]
    if not smaller:
        each = f"each {scheme.group_size} inputs" if scheme.group_size else "each output"
        return f"the scales for {each}, for it has groups of {', '.join(map(str, row.group_sizes))}"
    return wanted.model_copy(update={"group_size": max(smaller)})


def schemes_in(kept: Kept, fmt: str) -> dict[str, IntScheme | GgmlScheme] | str:
    """Each module's scheme in a format that holds it exactly; or what would be lost."""
    shapes = {tensor.name: tensor.shape for tensor in kept.tensors}
    widths: dict[IntScheme, int] = {}
    for module, scheme in kept.schemes.items():
        widths[scheme] = math.gcd(widths.get(scheme, 0), shapes[f"{module}.weight"][1])
    targets = {scheme: stored_as(scheme, width, fmt) for scheme, width in widths.items()}
    for scheme, target in targets.items():
        if isinstance(target, str):
            return f"{target} ({_example(kept, scheme)})"
    outside = [
        module for module in kept.schemes if not is_matrix_of_a_layer(TensorHeader(f"{module}.weight", (1, 1), ""))
    ]
    if outside:
        return f"the codes of {outside[0]}, which is outside of the layers"
    chosen = {module: t for module, s in kept.schemes.items() if not isinstance(t := targets[s], str)}
    if len(set(chosen.values())) > 1 and not FORMATS[fmt].per_layer_schemes:
        return "the schemes of some layers, for it has one for all"
    return chosen


def _example(kept: Kept, scheme: IntScheme) -> str:
    return next(module for module, own in kept.schemes.items() if own == scheme)


def resolved(recipe: KeepRecipe, kept: Kept) -> KeepRecipe | str:
    """The recipe with the source's scheme, and the modules that it leaves; or what would be lost, with a remedy."""
    if recipe.format == kept.format:
        return f"the source has the format {kept.format} already; choose another format, or leave the recipe out"
    schemes = schemes_in(kept, recipe.format)
    if isinstance(schemes, str):
        others = [
            name
            for name, row in FORMATS.items()
            if row.keeps and name != kept.format and not isinstance(schemes_in(kept, name), str)
        ]
        remedy = f"format: {' or '.join(others)} can hold it all" if others else "no format can hold it all"
        return (
            f"{recipe.format} would lose {schemes}; {remedy}, and a recipe with another method quantizes the original"
        )
    usual, _ = Counter(schemes.values()).most_common(1)[0]
    scheme = GgufScheme(mix=usual.kind) if isinstance(usual, GgmlScheme) else usual
    left = (tensor.name.removesuffix(".weight") for tensor in kept.tensors if is_matrix_of_a_layer(tensor))
    ignore = tuple(module for module in left if module not in kept.schemes)
    return recipe.model_copy(update={"scheme": scheme, "ignore": ignore, "source": kept.format})
