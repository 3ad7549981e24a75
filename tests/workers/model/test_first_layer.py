"""What the first layer makes of the embeddings' errors, told from its norms and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from tests.workers.jobs import ZOO
from workers.checkpoint.source import Source
from workers.model import first_layer
from workers.model.loading import StreamedModel

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "gemma, which adds one": tf.GemmaConfig(**SMALL),
    "gemma2, with four norms": tf.Gemma2Config(**SMALL),
    "stablelm, with biases": tf.StableLmConfig(**SMALL),
}


def saved(config: tf.PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_is_the_error_of_the_products(name: str, tmp_path: Path) -> None:
    """Of inputs whose mean square is one: e G e^T is in proportion to the products' squared error, norms included."""
    folder = saved(CONFIGS[name], tmp_path / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Source(folder) as source:
        found = first_layer.gram(StreamedModel(folder, source, dtype=torch.float32), source, 32)
    assert found is not None
    assert found.diagonal().mean().item() == pytest.approx(1)
    layer = model.model.layers[0]
    feed = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    into = [(layer.input_layernorm, getattr(layer.self_attn, f"{part}_proj")) for part in "qkv"]
    into += [(feed, getattr(layer.mlp, f"{part}_proj")) for part in ("gate", "up")]

    def made(signs_I: torch.Tensor) -> torch.Tensor:
        return torch.cat([product(norm(signs_I)) for norm, product in into]).detach()

    ratios = []
    for seed in range(5):
        half = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
        signs_I = torch.stack([half, -half], 1).flatten()  # without a mean, which some norms take away
        error = ((made(signs_I) - made(-signs_I)) / 2).square().sum()
        ratios.append((signs_I @ found @ signs_I / error).item())
    assert ratios == pytest.approx([ratios[0]] * 5, rel=1e-3)


def test_a_mixtures_experts_count_as_one(tmp_path: Path) -> None:
    folder = ZOO / "models" / "qwen3-moe-tiny"
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)
        found = first_layer.gram(streamed, source, 256)
        assert found is not None
        assert first_layer.gram(streamed, source, 128) is None, "norms of another width"
    assert torch.linalg.eigvalsh(found).min() > -1e-4


def test_unknown_names_of_norms_give_none(tmp_path: Path) -> None:
    folder = ZOO / "models" / "gpt2-tiny"
    with Source(folder) as source:
        assert first_layer.gram(StreamedModel(folder, source, dtype=torch.float32), source, 128) is None
