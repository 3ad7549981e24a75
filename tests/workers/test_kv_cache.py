"""``kv_cache: fp8``: scales of keys and values from the pass, and what the runtime makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.zoo import shipped
from tests.workers.faults import one, tensors
from tests.workers.jobs import ZOO, job, recipe
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats.decoded import Decoded, open_decoded
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.model.text import calibration_tokens, load_tokenizer
from workers.run import run_stage
from workers.spec.job import Job, Manifest, Stage
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder
from workers.verify.activations import rounded_inputs

LLAMA, MOE, GPT2 = (ZOO / "models" / name for name in ("llama-tiny", "qwen3-moe-tiny", "gpt2-tiny"))
KEYS, VALUES = (f"model.layers.1.self_attn.{leaf}" for leaf in ("k_scale", "v_scale"))


def cached(name: str) -> Recipe:
    return shipped.recipe(name).model_copy(update={"kv_cache": "fp8"})


def made(model: Path, place: Path, *recipes: Recipe) -> Job:
    of = job(model, place, *recipes)
    result = run_stage(of, Stage.QUANTIZE)
    assert result.failure is None, result.failure
    assert [artifact.error for artifact in result.artifacts] == [None] * len(recipes)
    return of


def verified(of: Job, number: int = 0) -> Manifest:
    result = run_stage(of, Stage.VERIFY, of.orders[number].recipe.name)
    assert result.manifest is not None, result.failure
    return result.manifest


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return made(LLAMA, tmp_path_factory.mktemp("kv"), cached("rtn-w4-g128"), cached("fp8-dynamic"))


def test_the_scales_are_those_of_what_transformers_caches(of: Job) -> None:
    assert of.calibration is not None
    (tokens,) = calibration_tokens(of.calibration, load_tokenizer(LLAMA, of.model)).groups
    model = tf.AutoModelForCausalLM.from_pretrained(LLAMA)
    with torch.no_grad():
        layers = model(tokens, use_cache=True).past_key_values.layers
    for order in of.orders:
        stored = load_file(artifact_folder(of.workspace, order) / "model.safetensors")
        for index, layer in enumerate(layers):
            for leaf, seen in (("k_scale", layer.keys), ("v_scale", layer.values)):
                scale = stored[f"model.layers.{index}.self_attn.{leaf}"]
                assert scale.dtype == torch.bfloat16
                assert scale.shape == (1,)
                # One rounding to bfloat16, and products in another order.
                torch.testing.assert_close(scale.float()[0], seen.abs().amax().float() / 448, rtol=2**-6, atol=0)


def test_transformers_rounds_what_we_round(of: Job) -> None:
    folder = artifact_folder(of.workspace, of.orders[0])
    ids = torch.arange(40).reshape(2, 20) * 7 % 500

    def ours() -> Tensor:
        with open_decoded(folder) as decoded:
            streamed = StreamedModel(folder, decoded, dtype=torch.bfloat16)
            with rounded_inputs(streamed, decoded) as counts:
                hidden = stream(streamed, [ids])
            assert "model.layers.0.self_attn" in counts.values
            return LogitsHead(streamed).logits(hidden[0]).float()

    model, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    with torch.no_grad():
        theirs = model(ids).logits.float()
    assert torch.equal(theirs, ours())


@pytest.mark.slow
def test_artifacts_are_accepted_and_say_so(of: Job) -> None:
    manifest = verified(of)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    card = (artifact_folder(of.workspace, of.orders[0]) / "README.md").read_text()
    assert "keys and values in FP8" in card


def test_scales_that_are_missing_are_named(of: Job, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(of.workspace, of.orders[0]), tmp_path / "q"))
    tensors(lambda loaded: loaded.pop(VALUES))(folder)
    with open_decoded(folder) as decoded:
        assert isinstance(decoded, Decoded)
        with pytest.raises(CheckpointError, match=f"{VALUES} isn't there"):
            decoded.scales_of_cache("model.layers.1.self_attn")


@pytest.mark.slow
def test_scales_that_clip_are_named(tmp_path: Path) -> None:
    of = made(LLAMA, tmp_path, cached("rtn-w4-g128"))
    folder = artifact_folder(of.workspace, of.orders[0])
    one(KEYS, lambda t: t / 64)(folder)
    reasons = " ".join(verified(of).verdict.reasons)
    assert "model.layers.1.self_attn: its static scale clips" in reasons


@pytest.mark.night
def test_a_mixture_under_its_own_activations(tmp_path: Path) -> None:
    own = {"refine": 0, "propagate": "quantized"}
    wanted = recipe(name="mine", method="gptq", scheme={"bits": 4, "group_size": 64}, options=own, kv_cache="fp8")
    manifest = verified(made(MOE, tmp_path, wanted))
    assert manifest.verdict.accepted, manifest.verdict.reasons


def test_the_identity_of_recipes_without_it_stays() -> None:
    of = job(LLAMA, Path(), "fp8-dynamic", cached("fp8-dynamic"))
    assert of.orders[0].fingerprint != of.orders[1].fingerprint
    assert not of.orders[0].recipe.calibrated
    assert of.orders[1].recipe.calibrated


def test_what_has_no_such_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"kv_cache: the format 'gptq' has no scales of keys and values; choose"):
        recipe(name="mine", method="rtn", scheme={"bits": 4}, format="gptq", kv_cache="fp8")
    folder = tmp_path / "gptj"
    config = tf.GPTJConfig(
        vocab_size=2048, n_positions=256, n_embd=128, n_layer=1, n_head=2, rotary_dim=32, bos_token_id=1, eos_token_id=2
    )
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((LLAMA / name).read_bytes())
    error = run_stage(job(folder, tmp_path, cached("rtn-w4-g128")), Stage.QUANTIZE).artifacts[0].error
    assert error is not None
    assert "no attention of GPTJForCausalLM is known to cache keys and values" in error.message


def test_a_checkpoint_whose_cache_is_rounded_otherwise_is_refused(of: Job, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(of.workspace, of.orders[0]), tmp_path / "q"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedRecipe, match="kv_cache_scheme"):
        open_decoded(folder)
    with open_decoded(artifact_folder(of.workspace, of.orders[0])) as decoded:
        assert isinstance(decoded, Decoded)
        assert KEYS not in decoded.headers
