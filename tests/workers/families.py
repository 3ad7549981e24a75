"""Small random models of many families, as people would save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split

COMMON: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**PLAIN, "num_key_value_heads": 2}
GPT: dict[str, Any] = {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LOCAL: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 16}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=8),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: tf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**PLAIN, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gemma2": lambda: tf.Gemma2Config(**LOCAL, query_pre_attn_scalar=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**LOCAL, query_pre_attn_scalar=8, layer_types=None),
    "gpt2": lambda: tf.GPT2Config(**GPT),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**PLAIN),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "opt": lambda: tf.OPTConfig(**{**PLAIN, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "phi": lambda: tf.PhiConfig(**PLAIN),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "falcon": lambda: tf.FalconConfig(**PLAIN),
    "bloom": lambda: tf.BloomConfig(**COMMON, hidden_size=32, n_layer=3, n_head=4),
    "cohere": lambda: tf.CohereConfig(**GROUPED),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=3.0, residual_multiplier=0.5),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED),
    "mamba": lambda: tf.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=3, state_size=8),
}


def save_random(name: str, folder: Path) -> Any:
    """Save a small random model of a family, and return it as transformers' plain loading gives it back."""
    return save_config(FAMILIES[name](), folder)


def save_config(config: Any, folder: Path, deviation: float = 0.3, dtype: torch.dtype = torch.float32) -> Any:
    """As ``save_random``, for any config, with weights of that standard deviation, saved in that dtype."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # initial weights of 0.02 would hide mistakes in tiny differences
                parameter.normal_(0.0, deviation)
    model.to(dtype).save_pretrained(folder)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    return plain.eval()


def save_tokenizer(folder: Path, vocabulary: int = 96) -> None:
    """Save a tokenizer of single characters beside a model: special tokens first, then what is most used in English."""
    characters = " etaoinshrdlucmfwypvbgkjqxz.,'\"!?;:-\n0123456789()"
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    assert len(tokens) <= vocabulary
    made = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    made.normalizer = Lowercase()
    made.pre_tokenizer = Split(Regex("."), "isolated")
    tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
