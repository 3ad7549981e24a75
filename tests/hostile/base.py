"""A small model by hand: everything that a checkpoint's folder needs, without torch, in 100 KB."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A canary's content: a private file beside the models that nothing may read into what it makes.
CANARY = "CANARY-7d1f2c-private"
HIDDEN, LAYERS, VOCABULARY = 64, 2, 260
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": False,
    "dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip


def shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with that config."""
    width, inner = HIDDEN, 128
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (width // 2, width) for name in "kv"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{prefix}mlp.down_proj.weight": (width, inner)}
        found |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}


def header_of(tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> dict[str, Any]:
    """A safetensors header for tensors of one dtype, of ``size`` bytes each element."""
    header, end = dict[str, Any](), 0
    for name, shape in tensors.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header


def safetensors(header: Any, data: bytes | None = None) -> bytes:
    """A safetensors file of any header: text and bytes go in as they are; data are small random bfloat16 numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data is None:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        pick = random.Random(0)
        # bfloat16 is the upper half of float32.
        data = b"".join(struct.pack("<f", pick.uniform(-0.2, 0.2))[2:] for _ in range(max(ends) // 2))
    return len(text).to_bytes(8, "little") + text + data


_WEIGHTS = safetensors(header_of(shapes()))


def tokenizer() -> str:
    """tokenizer.json of bytes, with <s>, </s> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    return str(made.to_str())


_TOKENIZER = tokenizer()


def write(folder: Path, config: Mapping[str, Any] | None = None, weights: bytes | None = _WEIGHTS) -> Path:
    """A whole model in ``folder``; ``config`` changes keys, None in it removes one; ``weights`` None: none."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in {**CONFIG, **(config or {})}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(_TOKENIZER)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder
