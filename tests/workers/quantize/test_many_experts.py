"""Mixtures of 128 and of 512 experts go through GPTQ within the memory that the plan promises, whatever their depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from pipeline.planning import sizing, sources
from pipeline.zoo.zoo import ModelEntry
from tests.workers.families import save_tokenizer
from tests.workers.jobs import job
from tests.workers.mixture_run import RECIPE, SAMPLES
from workers.formats.decoded import Decoded, open_decoded
from workers.machine import child
from workers.machine.warm import Parent
from workers.spec.workspace import artifact_folder

# Experts, and the widths of the hidden states and of an expert: 6 or 13 million weights in a layer.
SIZES = {128: (128, 128), 512: (128, 64)}
LAYERS = (2, 6)


def save_mixture(folder: Path, experts: int, layers: int) -> Path:
    """A random Qwen3-MoE in bfloat16."""
    hidden, width = SIZES[experts]
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        vocab_size=96, hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=layers, num_experts=experts,
        num_experts_per_tok=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=512, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.night
@pytest.mark.parametrize("experts", SIZES)
def test_peak_memory_is_that_of_a_layer_and_as_promised(experts: int, tmp_path: Path) -> None:
    peaks = {}
    for layers in LAYERS:
        model = save_mixture(tmp_path / f"{layers}", experts, layers)
        request = json.dumps([str(model), str(tmp_path / f"w{layers}")])
        with Parent() as parent:
            ended = child.run("tests.workers.mixture_run:quantized", request, warm=parent.address)
        assert ended.answer is not None, ended
        peaks[layers], fallbacks = json.loads(ended.answer)
        assert not any("half precision" in line for line in fallbacks)
        source = sources.resolve(ModelEntry(id=str(model)), tmp_path)
        of = job(model, tmp_path / f"w{layers}", RECIPE, samples=SAMPLES)
        promised = sizing.estimate(source, of.orders[0].recipe, of.calibration, of.verification).quantize.host
        assert peaks[layers] <= promised, (experts, layers, peaks, promised)
        with open_decoded(artifact_folder(of.workspace, of.orders[0])) as artifact:
            assert isinstance(artifact, Decoded)
            assert len([module for module in artifact.quantized if ".experts." in module]) == 3 * experts * layers
    layer = 4 * 3 * experts * SIZES[experts][0] * SIZES[experts][1]
    # Less than the weights of the layers more: what grows are objects for each tensor.
    assert peaks[LAYERS[1]] - peaks[LAYERS[0]] < (LAYERS[1] - LAYERS[0]) * layer
