"""Tied embeddings, stored in every way: each model is what transformers makes of it, and so are its artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.workers.families import save_random
from tests.workers.jobs import ZOO, job, recipe
from workers.checkpoint.source import Source
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.run import run_stage
from workers.spec.job import Stage, Thresholds
from workers.spec.workspace import artifact_folder

pytestmark = pytest.mark.usefixtures("forked")

LLAMA = ZOO / "models" / "llama-tiny"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = ("lm_head alone", "embeddings alone", "both, equal", "both, different")
ANY = Thresholds(kl_mean=50, top1_agreement=1e-4, perplexity_ratio=1e6, runtime_logit_difference=0.1)
IDS = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(3))


def tied(stored: str, folder: Path) -> Path:
    """A small random Llama whose config.json ties, with its tied pair stored in one of the ways of ``STORED``."""
    config = LlamaConfig.from_pretrained(LLAMA)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 256, 2
    config.head_dim, config.tie_word_embeddings = 32, True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    for path in LLAMA.glob("tokenizer*"):
        shutil.copy(path, folder)
    tensors = load_file(folder / "model.safetensors")
    pair = tensors.pop(EMBEDDINGS)
    if stored != "lm_head alone":
        tensors[EMBEDDINGS] = pair
    if stored != "embeddings alone":
        other = torch.randn(pair.shape, generator=torch.Generator().manual_seed(1)).to(pair.dtype) * 0.1
        tensors[HEAD] = other if stored == "both, different" else pair.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def by_transformers(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS, use_cache=False).logits


@pytest.mark.parametrize("stored", STORED)
def test_the_streamed_model_is_the_one_that_transformers_loads(stored: str, tmp_path: Path) -> None:
    folder = tied(stored, tmp_path)
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)
        (hidden,) = stream(streamed, [IDS])
        logits = LogitsHead(streamed).logits(hidden)
    assert (streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight) == (stored != "both, different")
    assert torch.equal(logits, by_transformers(folder))


TYING = ("llama", "gpt2", "gemma2", "opt", "bloom", "falcon", "mamba", "qwen3_moe", "gpt_neox")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", TYING)
def test_families_tie_as_transformers_does(family: str, stored: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ((head, embeddings),) = model._tied_weights_keys.items()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in (head, embeddings)}
    pair = model.get_input_embeddings().weight.detach()
    if stored != "lm_head alone":
        tensors[embeddings] = pair.clone()
    if stored != "embeddings alone":
        tensors[head] = pair.flip(0).clone() if stored == "both, different" else pair.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = IDS % 96
    with Source(tmp_path) as source, torch.inference_mode():
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        (hidden,) = stream(streamed, [ids])
        logits = LogitsHead(streamed).logits(hidden)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ids, use_cache=False).logits
    assert torch.allclose(logits, theirs, atol=1e-5 * float(theirs.std()))


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
def test_artifacts_are_made_and_accepted(stored: str, tmp_path: Path) -> None:
    names = ["bnb-nf4", "bnb-int8", "gptq-w4-g128", "awq-w4-g128-gemm"]
    in_gptq = recipe(name="gptq", method="gptq", scheme={"bits": 4, "group_size": 128}, format="gptq")
    of = job(tied(stored, tmp_path / "model"), tmp_path, *names, in_gptq, thresholds=ANY)
    made = run_stage(of, Stage.QUANTIZE)
    assert [artifact.error for artifact in made.artifacts] == [None] * len(of.orders), made.failure
    for order in of.orders:
        with Source(tmp_path / "model") as source, Source(artifact_folder(of.workspace, order)) as artifact:
            pair = {EMBEDDINGS, HEAD}
            assert pair & set(artifact.headers) == pair & set(source.headers)
        result = run_stage(of, Stage.VERIFY, order.recipe.name)
        assert result.manifest is not None, result.failure
        assert result.manifest.verdict.accepted, (order.recipe.name, result.manifest.verdict.reasons)
