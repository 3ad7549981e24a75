"""The smallest random model of each family that transformers knows as a causal LM, or as a multimodal one.

A config class's own defaults are shrunk by the names of their fields; OVERRIDES says where that doesn't do.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.walk.multimodal import OVERRIDES as MULTIMODAL

VOCABULARY = 256
# No model of the walk may be larger: one that is hasn't been shrunk.
MOST_PARAMETERS = 50_000_000
MOST_KINDS = 6

SIZES: dict[int, tuple[str, ...]] = {
    1: (
        "num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers",
        "topk_group", "n_group", "num_expert_group", "moe_layer_start_index", "mamba_n_groups", "n_groups",
        "mamba_ngroups", "num_nextn_predict_layers",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks",
        "num_encoder_layers", "num_decoder_layers", "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads",
        "linear_num_key_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
        "num_key_value_groups", "num_layers_per_stack",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
        "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads", "num_experts",
        "num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim", "mamba_dt_rank", "time_step_rank",
        "index_topk", "n_mamba_heads",
    ),
    8: (
        "qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads",
        "mamba_num_heads", "chunk_size", "mamba_chunk_size",
    ),
    16: (
        "head_dim", "swa_head_dim", "v_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        "index_head_dim", "d_head", "kv_channels", "attention_head_size", "dim_head", "mamba_d_head", "mamba_head_dim",
        "mamba_headdim", "query_pre_attn_scalar", "qk_head_dim",
        "sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size",
        "attention_chunk_size",
    ),
    32: ("q_lora_rank", "kv_lora_rank", "lru_rank"),
    64: (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim", "word_embed_proj_dim",
        "input_embedding_size", "output_embedding_size", "lru_width", "moe_intermediate_size",
        "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "attention_hidden_size",
        "router_hidden_size",
    ),
    128: (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff", "d_inner",
        "ffn_hidden_size", "n_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
        "mamba_d_ssm",
    ),
    VOCABULARY: ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    512: (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length",
    ),
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The rotary part of a head is its own size where keys and queries are projected through a narrow latent.
LATENT = {"head_dim": 8}
HEADS = {"head_dim": 16}
INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "ple_embed_dim": 64,
    "hc_lowrank": 8,
}
INTERLEAVED = {
    "num_hidden_layers": 4,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [128] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": {**LATENT, "num_key_value_heads": 4},
    # The global layers are the most, as they are in its checkpoints.
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{name: {"hidden_size": 64, "hidden_size_global": 64, "intermediate_size": 128, "num_hidden_layers": layers,
                  "num_attention_heads": 4, "num_key_value_heads": 4}
           for name, layers in (("patcher_config", 2), ("encoder_config", 2), ("decoder_config", 2),
                                ("global_config", 4))},
    },
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": LATENT,
    "deepseek_v32": {**LATENT, "num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "head_dim": 16},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "num_attention_heads": 4},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "flint": {"num_hidden_layers": 3, "mlp_only_layers": [0],
              "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gemma3n": {"text_config": SHARED_KEYS, "vision_config": {"model_args": {"channel_multiplier": 0.1}},
                "audio_config": {"conf_num_hidden_layers": 2}},
    "gemma3n_text": SHARED_KEYS,
    "gemma4_assistant": {"text_config": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    }},
    "glm_moe_dsa": {**LATENT, "num_key_value_heads": 4},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "inkling2_text": {"num_hidden_layers": 3, "n_layers_per_attn_res_block": 2,
                      "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 4, "attn_layer_offset": 2, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": INTERLEAVED},
    "llama4_text": INTERLEAVED,
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": HEADS,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32,
        "attention_hidden_size": 128, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16, "n_mamba_heads": 8, "attention_head_dim": 32, "attention_hidden_size": 128},
}  # fmt: skip


def _declare_kernels() -> None:
    """Declare two operators of torchvision where its kernels can't be loaded: it's built for CUDA, torch for the CPU.

    timm imports torchvision, which asks for them on import; no tower calls them.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_kernels()


def families(*, multimodal: bool = False) -> list[str]:
    """Every model type of transformers' mapping of causal, or of multimodal language models."""
    return list(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def loader(model_type: str, *, multimodal: bool) -> Any:
    """The auto class that publishers' models of a type are loaded with."""
    if not multimodal:
        return tf.AutoModelForCausalLM
    pictures = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return tf.AutoModelForImageTextToText if pictures else tf.AutoModelForMultimodalLM


def smallest_config(model_type: str, *, multimodal: bool = False) -> tf.PretrainedConfig:
    """A config of the family with few layers of each kind, few heads, narrow matrices."""
    given = OVERRIDES.get(model_type, {}) | (MULTIMODAL.get(model_type, {}) if multimodal else {})
    return _shrunk(CONFIG_MAPPING[model_type], given)


def _shrunk(kind: type[tf.PretrainedConfig], overrides: dict[str, Any]) -> tf.PretrainedConfig:
    try:
        plain = kind()
    except (TypeError, ValueError, KeyError, StrictDataclassError):
        plain = kind(**overrides)
    fields = {name: value for name, value in vars(plain).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, tf.PretrainedConfig):
            small[name] = _shrunk(type(value), overrides.get(name, {}))
        elif name in SMALL and isinstance(value, int) and value > 0 and not isinstance(value, bool):
            small[name] = min(SMALL[name], value)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[name] = SPECIAL.get(name, min(value, VOCABULARY - 1))
    small |= _chosen_layers(kind, fields, small)
    return kind(
        **{**small, **{name: v for name, v in overrides.items() if name not in small or not isinstance(v, dict)}}
    )


def _chosen_layers(kind: type[tf.PretrainedConfig], fields: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to layers of which each has an entry that the ones before hadn't."""
    name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = fields.get(name)
    if not isinstance(count, int) or isinstance(count, bool):
        return {}
    lists = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and len(v) == count and count > 2}
    if not lists:
        return {}
    chosen = _first_of_each([tuple(str(values[i]) for values in lists.values()) for i in range(count)])
    if len(chosen) < 2:
        chosen.append(next(index for index in range(count) if index not in chosen))
    return {name: len(chosen), **{n: [v[i] for i in sorted(chosen)] for n, v in lists.items()}}


def _first_of_each(entries: list[tuple[str, ...]]) -> list[int]:
    """Of layers of few kinds one of each; of others, layers of which each has an entry that the ones before hadn't."""
    kinds = dict(zip(reversed(entries), reversed(range(len(entries))), strict=True))
    if len(kinds) <= MOST_KINDS:
        return sorted(kinds.values())
    chosen: list[int] = []
    for index, entry in enumerate(entries):
        if not all(any(part == entries[i][place] for i in chosen) for place, part in enumerate(entry)):
            chosen.append(index)
    return chosen


def save_smallest(model_type: str, folder: Path, *, multimodal: bool = False) -> None:
    """Save the family's smallest model with random weights: matrices that keep the scale, norms away from 1."""
    config, auto = smallest_config(model_type, multimodal=multimodal), loader(model_type, multimodal=multimodal)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    assert count <= MOST_PARAMETERS, f"{model_type}: {count} parameters; shrink it by an entry in OVERRIDES"
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def load_plain(folder: Path, auto: Any = tf.AutoModelForCausalLM, **arguments: Any) -> Any:
    """The model as transformers' plain loading gives it back."""
    plain = auto.from_pretrained(folder, dtype=torch.float32, **arguments)
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    return plain.eval()
