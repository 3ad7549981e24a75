"""Sources whose weights are low-bit already, and that are quantized from what these decode to. Pure: no tensors.

Some models are published in FP8 or in four bits alone. Others are quantized copies of a half-precision original, which
is the better source; a zoo says `source: dequantize` to take such a copy all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.spec import kept
from workers.spec.families import family_of
from workers.spec.formats import BITSANDBYTES, COMPRESSED_TENSORS, FP8, recognised
from workers.spec.layers import loaded_dtype
from workers.spec.tensors import TensorHeader

# Families whose publishers give no half-precision weights: DeepSeek, MiniMax, Kimi, Mistral and OpenAI, by model_type.
NATIVE = frozenset({
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "gpt_oss", "kimi_k2", "kimi_k25", "minimax_m2", "ministral3",
})  # fmt: skip
# transformers' quant_method of gpt-oss: read as a source, and written by none of our recipes. Experts' codes and their
# scales are tensors of these endings.
MXFP4 = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
# Tensors of a quantized module that aren't its weight, by format.
BESIDE = {
    FP8.name: frozenset({"weight_scale_inv"}),
    COMPRESSED_TENSORS.name: frozenset(
        {"weight_scale", "weight_shape", "weight_global_scale", "input_scale", "input_global_scale"}
    ),
}
# Numbers in an element of packed codes, where their number of bits follows from the dtype.
PACKED_PAIRS = 2
MXFP4_BLOCK = 32


# Tensors of a module in bitsandbytes' format that aren't its codes; a state's name ends in its codebook's.
BITSANDBYTES_BESIDE = (
    ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map",
)  # fmt: skip
STATE = ".weight.quant_state.bitsandbytes__"
# Linear layers whose inputs, and those whose outputs, are the hidden states, by the last part of their names: headers
# have no shapes of 4-bit weights.
FROM_HIDDEN = frozenset({
    "q_proj", "k_proj", "v_proj", "qkv_proj", "W_pack", "query_key_value", "c_attn", "gate_proj", "up_proj",
    "gate_up_proj", "w1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "q_a_proj", "kv_a_proj_with_mqa",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_ba", "in_proj_a", "in_proj_b",
})  # fmt: skip
TO_HIDDEN = frozenset({
    "o_proj", "out_proj", "down_proj", "w2", "fc2", "fc_out", "c_proj", "dense", "dense_4h_to_h", "wo",
})  # fmt: skip


@dataclass(frozen=True)
class LowBit:
    """A low-bit source: its format, the dtype that its weights decode to, and its tensors as they are decoded."""

    format: str
    dtype: str
    tensors: tuple[TensorHeader, ...]


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a quantized source is its model's original."""
    return config.get("model_type") in NATIVE


def read(config: Mapping[str, Any], tensors: tuple[TensorHeader, ...]) -> LowBit | str:
    """What a quantized source decodes to, by its config.json and headers; or why that can't be told."""
    declared = config.get("quantization_config") or {}
    row = recognised(declared)
    dtype = loaded_dtype(config, [t for t in tensors if t.dtype != "F32"]) or "BF16"
    if declared.get("quant_method") == MXFP4:
        fused = _fused(dtype, tensors)
        return fused if isinstance(fused, str) else LowBit(MXFP4, dtype, fused)
    if row is not None and row.name in BESIDE:
        found = _decoded(row.name, dtype, tensors)
        if not isinstance(found, str):
            return LowBit(row.name, dtype, found)
        if row.name == FP8.name:
            return found
    if row is not None and row.name == BITSANDBYTES.name:
        blocks = _bitsandbytes(config, dtype, tensors)
        return blocks if isinstance(blocks, str) else LowBit(row.name, dtype, blocks)
    # Columns in order of activation are decoded, though no other format holds them.
    codes = kept.read({**declared, "desc_act": False}, tensors)
    if isinstance(codes, str):
        method = str(declared.get("quant_method") or getattr(row, "name", None))[:40]
        return f"quant_method {method!r}: {codes}"
    quantized = {f"{module}.weight" for module in codes.schemes}
    return LowBit(codes.format, dtype, tuple(_in(t, dtype) if t.name in quantized else t for t in codes.tensors))


def _in(tensor: TensorHeader, dtype: str) -> TensorHeader:
    return tensor._replace(dtype=dtype)


def _bitsandbytes(
    config: Mapping[str, Any], dtype: str, tensors: tuple[TensorHeader, ...]
) -> tuple[TensorHeader, ...] | str:
    """The tensors of a bitsandbytes checkpoint as they are decoded; or the one whose shape can't be told."""
    names = {tensor.name for tensor in tensors}
    four_bit = {name[: name.index(STATE)] for name in names if STATE in name}
    int8 = {name.removesuffix(".SCB") for name in names if name.endswith(".SCB")}
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    hidden = (text or config).get("hidden_size") or config.get("n_embd")
    conv1d = family_of(config.get("model_type")).conv1d
    decoded = []
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if tensor.name.endswith(BITSANDBYTES_BESIDE) or STATE in tensor.name:
            continue
        if leaf != "weight" or module not in four_bit | int8:
            decoded.append(tensor)
            continue
        shape_OI = tensor.shape if module in int8 else _four_bit_shape(module, 2 * tensor.bytes, hidden)
        if shape_OI is None:
            return (
                f"{module}: {2 * tensor.bytes} codes of 4 bits, whose shape isn't in the header and doesn't follow "
                f"from its name and hidden_size {hidden!r}"
            )
        decoded.append(TensorHeader(tensor.name, shape_OI[::-1] if conv1d else shape_OI, dtype))
    if not four_bit | int8:
        return "its config.json declares bitsandbytes, but none of its tensors is quantized in that format"
    return tuple(decoded)


def _four_bit_shape(module: str, count: int, hidden: object) -> tuple[int, int] | None:
    leaf = module.rpartition(".")[2]
    if not isinstance(hidden, int) or hidden < 1 or count % hidden or leaf not in FROM_HIDDEN | TO_HIDDEN:
        return None
    return (count // hidden, hidden) if leaf in FROM_HIDDEN else (hidden, count // hidden)


def fused_shape(blocks: tuple[int, ...], scales: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    """Experts, inputs and outputs of MXFP4 blocks (E, O, G, 16) with scales (E, O, G); None if they aren't such."""
    if len(blocks) != 4 or blocks[3] != MXFP4_BLOCK // 2 or scales != blocks[:3]:
        return None
    experts, rows, groups, _ = blocks
    return experts, MXFP4_BLOCK * groups, rows


def _fused(dtype: str, tensors: tuple[TensorHeader, ...]) -> tuple[TensorHeader, ...] | str:
    """The tensors of an MXFP4 checkpoint as they are decoded; or the one that isn't known how to decode."""
    by_name = {tensor.name: tensor for tensor in tensors}
    decoded = []
    for tensor in tensors:
        name = tensor.name.removesuffix(BLOCKS)
        if tensor.name.endswith(SCALES) and f"{tensor.name.removesuffix(SCALES)}{BLOCKS}" in by_name:
            continue
        if name == tensor.name:
            decoded.append(tensor)
            continue
        scales = by_name.get(f"{name}{SCALES}")
        shape = fused_shape(tensor.shape, scales.shape if scales else None)
        if shape is None or {tensor.dtype, scales.dtype if scales else ""} != {"U8"}:
            return f"{tensor.name}: {tensor.dtype} {tensor.shape} isn't blocks of {MXFP4_BLOCK} codes with their scales"
        decoded.append(TensorHeader(name, shape, dtype))
    if len(decoded) == len(tensors):
        return "its config.json declares mxfp4, but none of its tensors are blocks"
    return tuple(decoded)


def _decoded(fmt: str, dtype: str, tensors: Iterable[TensorHeader]) -> tuple[TensorHeader, ...] | str:
    """The tensors of a checkpoint as they are decoded; or the module that isn't known how to decode."""
    by_module: dict[str, set[str]] = {}
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        by_module.setdefault(module, set()).add(leaf)
    decoded = []
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if leaf in BESIDE[fmt]:
            continue
        scaled = bool(by_module[module] & {"weight_scale", "weight_scale_inv"})
        if leaf == "weight_packed":
            if tensor.dtype != "U8":
                return f"{module}: packed as {tensor.dtype}"
            rows, pairs = tensor.shape
            decoded.append(TensorHeader(f"{module}.weight", (rows, PACKED_PAIRS * pairs), dtype))
        elif leaf == "weight" and scaled:
            decoded.append(_in(tensor, dtype))
        elif leaf == "weight_zero_point":
            return f"{module}: it has zero points"
        else:
            decoded.append(tensor)
    return tuple(decoded)
