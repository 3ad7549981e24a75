"""Faults to plant in the folder of a good artifact, each with the text that the verdict's reasons must contain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.workers.jobs import ZOO
from workers.numerics.packing import pack_to_int32, unpack_from_int32

Change = Callable[[dict[str, Tensor]], object]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Planted:
    """A fault in the artifact of a model and recipe; one of the verdict's reasons must contain ``said``."""

    plant: Callable[[Path], object]
    said: str
    recipe: str = "rtn-w4-g128"
    model: str = "llama-tiny"


def tensors(change: Change) -> Callable[[Path], None]:
    """A fault that changes the loaded tensors in place."""

    def plant(folder: Path) -> None:
        loaded = load_file(folder / WEIGHTS)
        change(loaded)
        save_file(loaded, folder / WEIGHTS, metadata={"format": "pt"})

    return plant


def one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A fault that replaces one tensor."""
    return tensors(lambda loaded: loaded.update({name: change(loaded[name]).contiguous()}))


def setting(file: str, *path: str, value: Any) -> Callable[[Path], None]:
    """A fault that sets one key (at ``path``) of a JSON file."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return plant


def swapped(first: str, second: str) -> Callable[[Path], None]:
    """A fault that exchanges all tensors of two modules."""

    def change(loaded: dict[str, Tensor]) -> None:
        pairs = [(name, second + name.removeprefix(first)) for name in loaded if name.startswith(f"{first}.")]
        for a, b in pairs:
            loaded[a], loaded[b] = loaded[b], loaded[a]

    return tensors(change)


def nibbles_swapped(words: Tensor) -> Tensor:
    bytes_ = words.view(torch.uint8)
    return ((bytes_ << 4) | (bytes_ >> 4)).view(words.dtype)


def transposed(loaded: dict[str, Tensor]) -> None:
    """Replace the codes and scales of a square weight by those of its transpose."""
    module = "model.layers.2.self_attn.q_proj"
    stored = {suffix: loaded[f"{module}.{suffix}"] for suffix in ("weight_packed", "weight_scale", "weight_shape")}
    codes_OI = unpack_from_int32(stored["weight_packed"], 4, (256, 256))
    # Use a single scale, so that the weight differs from the original only by being transposed.
    scale = stored["weight_scale"].float().mean()
    values_OI = codes_OI.float() * stored["weight_scale"].float().repeat_interleave(128, dim=1)
    again_OI = (values_OI.T / scale).round().clamp(-8, 7).to(torch.int8).contiguous()
    loaded[f"{module}.weight_packed"] = pack_to_int32(again_OI, 4)
    loaded[f"{module}.weight_scale"] = torch.full_like(stored["weight_scale"], scale.item())


def in_half_precision(loaded: dict[str, Tensor]) -> None:
    for name in [name for name in loaded if name.startswith(f"{UP}.")]:
        del loaded[name]
    loaded[f"{UP}.weight"] = load_file(ZOO / "models" / "llama-tiny" / WEIGHTS)[f"{UP}.weight"]


def head_quantized(loaded: dict[str, Tensor]) -> None:
    weight = loaded.pop("lm_head.weight")
    codes = torch.randint(-8, 8, weight.shape, dtype=torch.int8)
    loaded["lm_head.weight_packed"] = pack_to_int32(codes, 4)
    loaded["lm_head.weight_scale"] = torch.ones(weight.shape[0], weight.shape[1] // 128, dtype=weight.dtype)
    loaded["lm_head.weight_shape"] = torch.tensor(weight.shape)


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])


def indexed(folder: Path, *, keys: Callable[[list[str]], list[str]] = list, file: str = WEIGHTS) -> None:
    """Write an index that maps the chosen ``keys`` of the only shard to ``file``."""
    placed = dict.fromkeys(keys(sorted(load_file(folder / WEIGHTS))), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def overwritten(name: str, text: str = "{}") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def renamed_tokens(folder: Path) -> None:
    """Exchange two tokens of the tokenizer, which changes no count or shape."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


PACKED, SCALE = f"{UP}.weight_packed", f"{UP}.weight_scale"
GROUP_0 = ("quantization_config", "config_groups", "group_0", "weights")
EXPERT = "model.layers.1.mlp.experts"

PLANTED: dict[str, Planted] = {
    # Codes
    "halves of bytes swapped": Planted(one(PACKED, nibbles_swapped), f"{UP}.weight: its inputs are in another order"),
    "codes of other rows": Planted(one(PACKED, lambda t: t.flip(0)), f"{UP}.weight: is -"),
    "rows in another order": Planted(
        tensors(lambda t: t.update({name: t[name].unflatten(0, (-1, 2)).flip(1).flatten(0, 1).contiguous()
                                    for name in (PACKED, SCALE)})),
        f"{UP}.weight: its outputs are in another order",
    ),
    "a transposed weight": Planted(tensors(transposed), "layers.2.self_attn.q_proj.weight: it is transposed"),
    "two layers swapped": Planted(
        swapped("model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        "layers.0.mlp.down_proj.weight: it holds model.layers.3.mlp.down_proj.weight",
    ),
    "gate and up swapped": Planted(
        swapped("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"),
        "layers.2.mlp.gate_proj.weight: it holds model.layers.2.mlp.up_proj.weight",
    ),
    # Scales
    "scales shifted by one group": Planted(
        one(SCALE, lambda t: t.roll(1, 1)), f"{UP}.weight: its scales aren't those of its codes"
    ),
    "scales of one layer halved": Planted(one(SCALE, lambda t: t / 2), f"{UP}.weight: its scales"),
    "scales negated": Planted(one(SCALE, lambda t: -t), f"{UP}.weight: its s"),
    "NaN in one scale": Planted(
        one(SCALE, lambda t: t.index_fill(0, torch.tensor(3), float("nan"))), f"NaN or Inf in {UP}.weight"
    ),
    "Inf in one scale": Planted(
        one(SCALE, lambda t: t.index_fill(0, torch.tensor(3), float("inf"))), f"NaN or Inf in {UP}.weight"
    ),
    "a missing scale": Planted(tensors(lambda t: t.pop(SCALE)), f"{UP}"),
    # Tensors and what is declared
    "one layer left in half precision": Planted(
        tensors(in_half_precision), f"not quantized though the recipe says so: {UP}"
    ),
    "a quantized head": Planted(tensors(head_quantized), "quantized though the recipe doesn't say so: lm_head"),
    "a config that promises other bits": Planted(
        setting("config.json", *GROUP_0, "num_bits", value=8), "8 bits that config.json declares"
    ),
    "a config that promises other groups": Planted(
        setting("config.json", *GROUP_0, "group_size", value=64), "groups of 64"
    ),
    "a config without its quantization": Planted(
        setting("config.json", "quantization_config", value=None), "not quantized though the recipe says so"
    ),
    "a changed embedding": Planted(
        one("model.embed_tokens.weight", lambda t: t * 1.01), "embed_tokens.weight isn't quantized, but differs"
    ),
    "a norm in another dtype": Planted(
        one("model.norm.weight", lambda t: t.half()), "model.norm.weight isn't quantized, but differs"
    ),
    "rows cut off the embedding": Planted(
        one("model.embed_tokens.weight", lambda t: t[:-8].clone()), "embed_tokens.weight has the shape"
    ),
    "a missing norm": Planted(tensors(lambda t: t.pop("model.norm.weight")), "tensors missing: model.norm.weight"),
    "an untied head": Planted(
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
        "tensors that the source doesn't have: lm_head.weight", model="qwen3-moe-tiny",
    ),
    "tied by its config": Planted(
        setting("config.json", "tie_word_embeddings", value=True), "config.json differs from the source's: tie_word"
    ),
    "another activation": Planted(
        setting("config.json", "hidden_act", value="gelu"), "config.json differs from the source's: hidden_act"
    ),
    # Files
    "a truncated shard": Planted(truncated, "truncated"),
    "a stale index": Planted(partial(indexed, keys=lambda keys: keys[:-1]), "files that the source doesn't have"),
    "an index of other shards": Planted(
        partial(indexed, file="model-00001-of-00002.safetensors"), "files that the source doesn't have"
    ),
    "weights of another format beside": Planted(overwritten("pytorch_model.bin"), "pytorch_model.bin"),
    "another tokenizer": Planted(renamed_tokens, "differ from the source's: tokenizer.json"),
    "a changed chat template": Planted(
        overwritten("chat_template.jinja", "{{ messages }}"), "differ from the source's: chat_template.jinja"
    ),
    "no chat template": Planted(
        lambda folder: (folder / "chat_template.jinja").unlink(), "files of the source missing: chat_template.jinja"
    ),
    "another generation config": Planted(
        setting("generation_config.json", "eos_token_id", value=7), "differ from the source's: generation_config.json"
    ),
    "no licence": Planted(lambda folder: (folder / "LICENSE").unlink(), "files of the source missing: LICENSE"),
    # Zero points
    "zero points one too high": Planted(
        one(f"{UP}.qzeros", lambda t: t + 0x11111111), f"{UP}.weight: its zero points", "rtn-w4-gptq",
    ),
    "the other convention of zero points": Planted(
        setting("config.json", "quantization_config", "checkpoint_format", value="gptq_v2"),
        "its zero points", "rtn-w4-gptq",
    ),
    "codes not in AWQ's order": Planted(
        one(f"{UP}.qweight", nibbles_swapped), f"{UP}.weight: its outputs are in another order", "awq-w4-g128-gemm",
    ),
    # Experts
    "an expert missing": Planted(
        tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERT}.2.")]),
        "experts.2", model="qwen3-moe-tiny",
    ),
    "two experts swapped": Planted(
        swapped(f"{EXPERT}.1.down_proj", f"{EXPERT}.3.down_proj"),
        f"{EXPERT}.1.down_proj.weight: it holds {EXPERT}.3.down_proj.weight", model="qwen3-moe-tiny",
    ),
    "another router": Planted(
        one("model.layers.1.mlp.gate.weight", lambda t: t.roll(1, 0)),
        "mlp.gate.weight isn't quantized, but differs", model="qwen3-moe-tiny",
    ),
    # Other formats
    "scales of fp8 upside down": Planted(one(SCALE, lambda t: 1 / t), f"{UP}.weight: its scales", "fp8-dynamic"),
    "inputs clipped by their scale": Planted(
        one(f"{UP}.input_scale", lambda t: t / 64), f"{UP}: its static scale clips", "fp8-static"
    ),
    "inputs clipped by the scale of their scales": Planted(
        one(f"{UP}.input_global_scale", lambda t: t * 64), f"{UP}: its static scale clips", "nvfp4-w4a4"
    ),
    "block scales of nvfp4 shifted": Planted(one(SCALE, lambda t: t.roll(1, 1)), f"{UP}.weight: its scales", "nvfp4"),
    "absmax of nf4 shifted": Planted(
        one(f"{UP}.weight.absmax", lambda t: t.roll(1, 0)), f"{UP}.weight: its scales", "bnb-nf4",
    ),
}  # fmt: skip
