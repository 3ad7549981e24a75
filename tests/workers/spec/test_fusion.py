"""What runtimes fuse has one scheme and one global scale, and what they take for linear layers is declared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from pipeline.zoo import shipped
from tests.workers import jobs
from workers.quantize.one_pass import quantize
from workers.spec import fusion
from workers.spec.job import ModelPin, fingerprint
from workers.spec.layers import kinds_of
from workers.spec.runtimes import VLLM
from workers.spec.tensors import TensorHeader

MODELS = jobs.ZOO / "models"
LLAMA, MIXTURE = MODELS / "llama-tiny", MODELS / "qwen3-moe-tiny"
RECIPES = shipped.recipe_names()


@given(st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1"])))
def test_modules_are_together_where_a_runtime_fuses_them(leaves: list[str]) -> None:
    modules = [f"model.layers.{number % 2}.x.{leaf}" for number, leaf in enumerate(leaves)]
    groups = fusion.together(dict.fromkeys(modules))
    assert sorted(name for group in groups for name in group) == sorted(set(modules))
    for group in groups:
        assert len({fusion.fused_group(name) for name in group}) == 1
        assert len({name.rpartition(".")[0] for name in group}) == 1


def test_schemes_that_part_a_fused_layer_are_found() -> None:
    schemes = {"l.0.q_proj": 4, "l.0.k_proj": 4, "l.0.v_proj": 8, "l.0.o_proj": 8, "l.1.q_proj": 8, "l.1.k_proj": 8}
    assert fusion.split_groups(schemes) == [["l.0.k_proj", "l.0.q_proj", "l.0.v_proj"]]
    assert fusion.split_groups({"gate_proj": 4, "up_proj": None}) == [["gate_proj", "up_proj"]]
    experts = {f"l.0.experts.{number}.{leaf}": 4 for number in range(2) for leaf in ("gate_proj", "down_proj")}
    assert fusion.split_groups(experts) == []
    assert fusion.split_groups({**experts, "l.0.experts.1.down_proj": 8}) == [sorted(experts)]


@pytest.mark.parametrize("name", [name for name in RECIPES if shipped.recipe(name).format in VLLM.rules])
@pytest.mark.parametrize("model", [LLAMA, MIXTURE], ids=["dense", "mixture"])
def test_no_shipped_recipe_parts_what_runtimes_fuse(name: str, model: Path) -> None:
    with safe_open(model / "model.safetensors", framework="pt") as reader:
        keys = reader.keys()
        headers = [TensorHeader(key, tuple(reader.get_slice(key).get_shape()), "BF16") for key in keys]
    assert not kinds_of(shipped.recipe(name), headers, conv1d=False).split


def made(model: Path, tmp_path: Path, *names: str) -> dict[str, Path]:
    recipes = [shipped.recipe(name) for name in names]
    job = jobs.job(model, tmp_path, *recipes, samples=1)
    artifacts, _ = quantize(job, model)
    assert all(artifact.error is None for artifact in artifacts), artifacts
    return {artifact.recipe: Path(artifact.path) for artifact in artifacts}


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("nvfp4", ".weight_global_scale"),
        ("nvfp4-w4a4", ".input_global_scale"),
        ("fp8-static", ".weight_scale"),
        ("fp8-static", ".input_scale"),
    ],
)
def test_what_vllm_keeps_one_scale_of_shares_it(name: str, leaf: str, tmp_path: Path) -> None:
    folder = made(LLAMA, tmp_path, name)[name]
    tensors = load_file(folder / "model.safetensors")
    scales = {key.removesuffix(leaf): t for key, t in tensors.items() if key.endswith(leaf)}
    assert len(scales) > 20
    for group in fusion.together(scales):
        assert len({scales[name].item() for name in group}) == 1, group
    # Layers that stay alone keep their own.
    assert len({scale.item() for scale in scales.values()}) > len(fusion.together(scales)) // 2


@pytest.mark.parametrize("recipe", ["rtn-w4-g128", "fp8-block"])
def test_routers_and_prediction_heads_are_declared(recipe: str, tmp_path: Path) -> None:
    """A router is no Linear in transformers, and one in vLLM; prediction heads are built by vLLM alone."""
    model = tmp_path / "model"
    model.mkdir()
    for path in MIXTURE.iterdir():
        if path.name != "model.safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(MIXTURE / "model.safetensors")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((made(model, tmp_path / "work", recipe)[recipe] / "config.json").read_text())
    declared = config["quantization_config"]
    left = set(declared.get("ignore") or declared["modules_to_not_convert"])
    routers = {key.removesuffix(".weight") for key in tensors if key.endswith("mlp.gate.weight")}
    assert routers
    assert routers <= left
    assert "lm_head" in left
    assert not any("embed_tokens" in name or "norm" in name for name in left)
    quantized = {key for key, tensor in tensors.items() if ".experts." in key and tensor.dim() == 2}
    assert not left & {key.removesuffix(".weight") for key in quantized}


def test_artifacts_that_declared_too_little_get_another_identity() -> None:
    dense = ModelPin(id="org/name", revision="0" * 40)
    mixture = dense.model_copy(update={"mixture": True})
    for name in ("rtn-w4-g128", "fp8-block"):
        recipe = shipped.recipe(name)
        assert fingerprint(dense, recipe, None, None) != fingerprint(mixture, recipe, None, None)
    nf4 = shipped.recipe("bnb-nf4")
    assert fingerprint(dense, nf4, None, None) == fingerprint(mixture, nf4, None, None)
