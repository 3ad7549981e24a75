"""Helpers for tests of formats: small checkpoints, codes by rounding, and artifacts written without the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.formats.decoded import open_decoded
from workers.numerics.codes import CodedWeight, IntWeight
from workers.spec.schemes import IntScheme, LinearScheme

SMALL = {"vocab_size": 96, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
DENSE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, **DENSE, intermediate_size=128),
    # The intermediate width is divisible by 32, but not by 64.
    "odd": lambda: tf.LlamaConfig(**SMALL, **DENSE, intermediate_size=160),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SMALL, **DENSE, moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: tf.MixtralConfig(
        **SMALL, **DENSE, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    ),
}
IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(3))


def make_sources(folder: Path) -> dict[str, Path]:
    """Write a random bfloat16 checkpoint for each of ``CONFIGS``; returns their folders by name."""
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        tf.AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


def scheme(bits: int, group_size: int | None, symmetric: bool = True) -> IntScheme:
    return IntScheme(bits=bits, group_size=group_size, symmetric=symmetric)


def round_to_nearest(weight_OI: Tensor, chosen: IntScheme, dtype: torch.dtype) -> IntWeight:
    rows, columns = weight_OI.shape
    w = weight_OI.float().view(rows, -1, chosen.group_size or columns)
    low, high = -(2 ** (chosen.bits - 1)), 2 ** (chosen.bits - 1) - 1
    if chosen.symmetric:
        scale = (w.abs().amax(-1) * 2 / (high - low)).to(dtype)
        zero = None
    else:
        scale = ((w.amax(-1) - w.amin(-1)) / (high - low)).to(dtype)
        zero = (low - w.amin(-1) / scale.float()).round().clamp(low + 1, high).to(torch.int8)
    offset = 0 if zero is None else zero.float()[:, :, None]
    codes = (w / scale.float()[:, :, None] + offset).round().clamp(low, high)
    return IntWeight(codes.to(torch.int8).view(rows, columns), scale, zero, chosen.bits, chosen.group_size)


def random_weight(rows: int, columns: int, chosen: IntScheme, dtype: torch.dtype, seed: int = 0) -> IntWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight, chosen, dtype)


def value_of(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight: (code - zero point) x scale of the column's group."""
    group = torch.arange(weight.codes_OI.shape[1]) // (weight.group_size or weight.codes_OI.shape[1])
    zero = 0 if weight.zero_OG is None else weight.zero_OG[:, group].int()
    return (weight.codes_OI.int() - zero).to(dtype) * weight.scale_OG[:, group].to(dtype)


def is_linear(module: str) -> bool:
    return ".layers." in module and "norm" not in module and not module.endswith((".mlp.gate", "block_sparse_moe.gate"))


def write(
    source: Path,
    target: Path,
    schemes: Callable[[str], LinearScheme | None],
    fmt: Any,
    dtype: torch.dtype = torch.bfloat16,
    coder: Callable[[Tensor, Any, torch.dtype], CodedWeight] = round_to_nearest,
) -> Path:
    """Quantize a checkpoint by rounding; ``schemes`` maps a Linear module to its scheme, None leaves it unquantized."""
    stored: dict[str, Tensor] = {}
    used: dict[str, LinearScheme] = {}
    kept = ["lm_head"]
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        chosen = schemes(module) if is_linear(module) else None
        if chosen is None:
            stored[key] = tensor
            kept += [module] if is_linear(module) else []
        else:
            used[module] = chosen
            parts = fmt.encode(coder(tensor, chosen, dtype), chosen)
            stored |= {f"{module}.{name}": part for name, part in parts.items()}
    target.mkdir()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = fmt.quantization_config(used, kept)
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_decoded(quantized: Path, source: Path, target: Path) -> Path:
    """Write a quantized checkpoint as a float checkpoint, dequantized by our own decoder."""
    target.mkdir()
    with open_decoded(quantized) as decoded:
        save_file({name: decoded.read(name) for name in decoded.headers}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@torch.no_grad()
def assert_transformers_agrees(quantized: Path, source: Path, scratch: Path) -> None:
    want = tf.AutoModelForCausalLM.from_pretrained(write_decoded(quantized, source, scratch))(IDS).logits
    model, info = tf.AutoModelForCausalLM.from_pretrained(quantized, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    assert torch.equal(model(IDS).logits, want)
