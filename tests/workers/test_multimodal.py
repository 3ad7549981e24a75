"""A multimodal checkpoint through all stages: towers stay as they are, and a picture is shown to what was made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.planning.fitting import recipe_problems
from pipeline.planning.sources import resolve
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers.jobs import job, quick, recipe
from tests.workers.multimodal import save_gemma3, save_llava
from workers.errors import CheckpointError, PreflightError
from workers.formats.decoded import open_decoded
from workers.machine.environments import interpreter
from workers.run import run_stage
from workers.spec.auto_classes import AUTO_CLASSES, classes, is_multimodal, loader_of
from workers.spec.job import Job, Manifest, PictureCheck, Stage
from workers.spec.layers import LayerKinds, layer_of
from workers.spec.runtimes import misfit
from workers.spec.schemes import GgufScheme
from workers.spec.workspace import artifact_folder
from workers.verify import gates, picture

RECIPES = (
    "gptq-mixed-4-8",
    "bnb-nf4",
    recipe(name="g", method="rtn", scheme={"bits": 4, "group_size": 64}, format="gptq"),
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("multimodal") / "llava-tiny")


@pytest.fixture(scope="module")
def of(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    made = job(llava, tmp_path_factory.mktemp("work"), *RECIPES)
    result = run_stage(made, Stage.QUANTIZE)
    assert [artifact.error for artifact in result.artifacts] == [None] * len(RECIPES)
    return made


def verified(of: Job, name: str) -> Manifest:
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    return result.manifest


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gptq-mixed-4-8", marks=pytest.mark.slow),
        pytest.param("bnb-nf4", marks=pytest.mark.night),
        pytest.param("g", marks=pytest.mark.night),
    ],
)
def test_it_is_accepted_with_a_picture(of: Job, name: str) -> None:
    manifest = verified(of, name)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    seen = manifest.verdict.picture
    assert seen is not None
    assert seen.unchecked == ""
    assert seen.tokens == picture.POSITIONS
    assert 1e-6 < seen.kl_mean < 0.2
    folder = artifact_folder(of.workspace, of.order(name))
    card = (folder / "README.md").read_text()
    assert "A picture was shown to it and to the original" in card
    assert "AutoModelForImageTextToText" in card
    assert "AutoProcessor" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_towers_and_processor_are_those_of_the_source(of: Job, llava: Path) -> None:
    source = load_file(llava / "model.safetensors")
    for order in of.orders:
        folder = artifact_folder(of.workspace, order)
        made = load_file(folder / "model.safetensors")
        beside = [key for key in source if key.startswith(("vision_tower.", "multi_modal_projector."))]
        assert len(beside) > 40
        assert all(torch.equal(made[key], source[key]) for key in beside)
        assert (folder / "processor_config.json").read_bytes() == (llava / "processor_config.json").read_bytes()


def test_a_source_without_a_processor_is_said_to_be_unchecked(llava: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(llava, tmp_path / "bare"))
    (bare / "processor_config.json").unlink()
    of = job(bare, tmp_path / "work", "fp8-dynamic")
    shown = picture.source_shown(of.model, bare, json.loads((bare / "config.json").read_text()), tmp_path)
    assert shown is not None
    assert "without a processor" in shown.unchecked
    seen, problems = picture.check(shown, of.model, bare, {}, tmp_path)
    assert "without a processor" in seen.unchecked
    assert problems == ()


def test_a_processor_that_cannot_be_loaded_is_the_sources_fault(llava: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(llava, tmp_path / "broken"))
    (broken / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "image_processor": 7}')
    of = job(broken, tmp_path / "work", "fp8-dynamic")
    with pytest.raises(CheckpointError, match=r"can't show a picture to its source .*mend its processor's files"):
        picture.source_shown(of.model, broken, json.loads((broken / "config.json").read_text()), tmp_path)


@pytest.mark.slow
def test_another_reading_of_a_picture_is_a_regression(of: Job, llava: Path, tmp_path: Path) -> None:
    config = json.loads((llava / "config.json").read_text())
    shown = picture.source_shown(of.model, llava, config, tmp_path)
    assert shown is not None
    assert shown.logits_NV is not None
    other = replace(shown, logits_NV=shown.logits_NV.roll(1, -1))
    seen, _ = picture.check(other, of.model, llava, config, tmp_path)
    assert seen.kl_mean > 1
    strict = of.orders[0].thresholds.model_copy(update={"kl_mean": 0.1})
    verdict = gates.by_thresholds(gates.Evidence(picture=seen), strict)
    assert "KL divergence after a picture" in verdict.reasons[0]
    same, _ = picture.check(shown, of.model, llava, config, tmp_path)
    assert same == PictureCheck(version=same.version, kl_mean=0.0, top1_agreement=1.0, tokens=picture.POSITIONS)


def has_llama_cpp() -> bool:
    try:
        return interpreter("llama-cpp").is_file()
    except PreflightError:
        return False


with_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="`quantmill env create llama-cpp` wasn't run here")


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_text_model_is_a_gguf_file_of_its_own(llava: Path, tmp_path: Path) -> None:
    """llama.cpp's converter knows of llava's kind the projector of pixtral alone."""
    made = job(llava, tmp_path, quick(shipped.recipe("gguf-q8_0")), samples=1)
    (artifact,) = run_stage(made, Stage.QUANTIZE).artifacts
    assert artifact.error is None, artifact.error
    (note,) = [line for line in artifact.fallbacks if line.startswith("towers and projector")]
    assert "Unsupported model type: clip_vision_model" in note
    manifest = verified(made, "gguf-q8_0")
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.verdict.runtime is not None
    assert manifest.verdict.runtime.name == "llama.cpp"
    assert [file for file in manifest.files if file.startswith("mmproj-")] == []
    assert note in (Path(artifact.path) / "README.md").read_text()


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_projector_is_another_file_by_llama_cpps_converter(tmp_path: Path) -> None:
    folder = save_gemma3(tmp_path / "gemma3-tiny")
    made = job(folder, tmp_path / "work", quick(shipped.recipe("gguf-q8_0")), samples=1)
    (artifact,) = run_stage(made, Stage.QUANTIZE).artifacts
    assert artifact.error is None, artifact.error
    assert any(
        "mmproj-gemma3-tiny-F16.gguf, in float16 by llama.cpp's converter" in note for note in artifact.fallbacks
    )
    written = (Path(artifact.path) / "mmproj-gemma3-tiny-F16.gguf").read_bytes()
    assert all(tensor in written for tensor in (b"v.patch_embd.weight", b"mm.input_projection.weight"))
    with open_decoded(Path(artifact.path)) as decoded:
        assert not [key for key in decoded.headers if "vision_tower" in key]
        assert "language_model.model.layers.0.mlp.up_proj.weight" in decoded.headers


def test_formats_of_text_models_alone_are_refused_by_the_plan(llava: Path) -> None:
    source = resolve(ModelEntry(id=str(llava)), llava.parent)
    (problem,) = recipe_problems(source, shipped.recipe("mlx-w4-g64"))
    assert "the text model alone" in problem
    for name in ("gptq-w4-g128", "gguf-q4_0"):
        assert list(recipe_problems(source, shipped.recipe(name))) == []
    other = LayerKinds(multimodal=True, model_type="idefics3")
    assert "family idefics3, whose text model wasn't tried as a file of its own" in str(
        misfit("gguf", GgufScheme(mix="q4_0"), other)
    )
    (problem,) = recipe_problems(source, shipped.recipe("gptq-w4-g128"), ("transformers", "vLLM"))
    assert "needs torchvision in vLLM" in problem


def test_the_tables_of_classes_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto

    for auto in AUTO_CLASSES:
        assert dict(classes(auto.table)) == dict(getattr(modeling_auto, auto.table))


def test_the_class_that_config_json_names_is_loaded() -> None:
    def loader(kind: str, *architectures: str) -> tuple[str, bool]:
        config = {"model_type": kind, "architectures": list(architectures)}
        return loader_of(config), is_multimodal(config)

    assert loader("llama", "LlamaForCausalLM") == ("AutoModelForCausalLM", False)
    assert loader("qwen3_5", "Qwen3_5ForCausalLM") == ("AutoModelForCausalLM", False)
    assert loader("qwen3_5", "Qwen3_5ForConditionalGeneration") == ("AutoModelForImageTextToText", True)
    assert loader("gemma3", "Gemma3ForConditionalGeneration") == ("AutoModelForCausalLM", True)
    assert loader("qwen2_audio", "Qwen2AudioForConditionalGeneration") == ("AutoModelForMultimodalLM", True)
    assert loader("llava") == ("AutoModelForImageTextToText", False)
    assert loader("never heard of", "X") == ("AutoModelForCausalLM", False)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "3"),
        ("language_model.model.layers.12.self_attn.q_proj.weight", "12"),
        ("model.language_model.layers.0.mlp.experts.7.up_proj.weight", "0"),
        ("transformer.h.5.attn.c_attn.weight", "5"),
        ("transformer.blocks.5.ffn.up_proj.weight", "5"),
        ("gpt_neox.layers.1.attention.dense.weight", "1"),
        ("encoder.layer.1.attention.self.query.weight", "1"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("model.visual.blocks.4.attn.qkv.weight", None),
        ("model.vision_model.encoder.layers.4.self_attn.k_proj.weight", None),
        ("audio_tower.layers.2.fc1.weight", None),
        ("model.audio_encoder.layers.2.fc1.weight", None),
        ("thinker.visual.blocks.3.mlp.linear_fc1.weight", None),
        ("multi_modal_projector.layers.0.weight", None),
        ("mtp.layers.0.self_attn.q_proj.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_told_from_towers_by_name(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer
