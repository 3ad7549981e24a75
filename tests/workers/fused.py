"""Small models whose publishers give the experts of a layer in one low-bit tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.workers.families import save_tokenizer
from workers.numerics import microscaling

SMALLEST = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = (".gate_up_proj", ".down_proj")


def save_gpt_oss(folder: Path) -> Path:
    """A small random gpt-oss as OpenAI publishes it: experts in MXFP4, all else in bfloat16."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.GptOssConfig(**SMALLEST), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # Attention of a small share: random routers turn small errors into other experts.
                parameter.normal_(0.0, 0.1 if name.endswith(EXPERTS) else 0.03 if ".self_attn." in name else 0.15)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        coded = [microscaling.mxfp4(weight_IO.T.contiguous()) for weight_IO in tensors.pop(name)]
        tensors[f"{name}_blocks"] = torch.stack(
            [microscaling.pack(codes_OI).unflatten(-1, (-1, 16)) for codes_OI, _ in coded]
        )
        tensors[f"{name}_scales"] = torch.stack([scale_OG for _, scale_OG in coded])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder
