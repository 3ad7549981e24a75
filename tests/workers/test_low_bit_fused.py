"""gpt-oss: experts of a layer in one MXFP4 tensor, decoded layer by layer as transformers decodes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.workers.formats.test_mlx import environment
from tests.workers.fused import save_gpt_oss
from tests.workers.jobs import job
from tests.workers.test_low_bit import accepted, decoded_job
from workers.checkpoint.source import Source
from workers.errors import UnsupportedModel
from workers.formats import mxfp4
from workers.formats.decoded import open_decoded
from workers.formats.kept import DecodedSource, open_source
from workers.run import run_stage
from workers.spec.job import Stage
from workers.spec.workspace import artifact_folder


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    scales=st.tuples(st.integers(0, 254), st.integers(0, 254)).map(sorted),
    seed=st.integers(0, 2**16),
)
def test_experts_are_decoded_bit_by_bit_as_transformers_does(
    sizes: tuple[int, int, int], scales: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*sizes, 16), generator=generator, dtype=torch.uint8)
    scale = torch.randint(scales[0], scales[1] + 1, sizes, generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scale, dtype=torch.bfloat16)
    ours = mxfp4.decode(blocks, scale)
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_the_plan_takes_it_without_a_word_and_weights_are_those_of_transformers(gpt_oss: Path) -> None:
    source = resolve(ModelEntry(id=str(gpt_oss)), gpt_oss.parent)
    assert source.decoded == "mxfp4"
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.bfloat16, quantization_config=tf.Mxfp4Config(dequantize=True)
    ).state_dict()
    with open_source(gpt_oss, source.pin) as opened:
        assert isinstance(opened, DecodedSource)
        planned = {tensor.name: tuple(tensor.shape) for tensor in source.tensors}
        assert planned == {name: tuple(header.shape) for name, header in opened.headers.items()}
        assert sum(tensor.bytes for tensor in source.tensors) == opened.bytes
        assert set(opened.headers) == set(theirs)
        for name in opened.headers:
            assert torch.equal(opened.read(name), theirs[name]), name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gptq-w4-g128", marks=pytest.mark.slow),
        pytest.param("fp8-dynamic", marks=pytest.mark.night),
        pytest.param("nvfp4", marks=pytest.mark.night),
    ],
)
def test_it_is_quantized_verified_and_loaded(name: str, gpt_oss: Path, tmp_path: Path) -> None:
    of = decoded_job(gpt_oss, tmp_path, name)
    assert any("experts.gate_up_proj" in line for line in accepted(of, name).fallbacks)
    folder = artifact_folder(of.workspace, of.orders[0])
    with Source(folder) as artifact, open_source(gpt_oss, of.model) as source:
        experts = "model.layers.1.mlp.experts.down_proj"
        assert torch.equal(artifact.read(experts), source.read(experts))


def test_blocks_without_scales_are_refused_by_the_plan(gpt_oss: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(gpt_oss, tmp_path / "odd"))
    tensors = load_file(odd / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"can't be decoded: model.layers.0.mlp.experts.down_proj_blocks: U8"):
        resolve(ModelEntry(id=str(odd)), tmp_path)


def test_its_codes_cannot_be_kept_by_the_method_for_integers(gpt_oss: Path, tmp_path: Path) -> None:
    of = job(gpt_oss, tmp_path, "keep-gptq")
    with pytest.raises(UnsupportedModel, match="method: keep can't read it: its codes are of the kind 'mxfp4'"):
        open_source(gpt_oss, of.model)


@pytest.mark.parametrize("name", ["mlx-mxfp4", "mlx-w4-g64"])
def test_mlx_stores_its_experts_as_they_are(name: str, gpt_oss: Path, tmp_path: Path) -> None:
    of = decoded_job(gpt_oss, tmp_path, name)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    assert "experts in MXFP4: codes and scales are the source's own, bit for bit" in made.fallbacks
    assert not any(line.startswith("left in half precision") for line in made.fallbacks)
    folder = artifact_folder(of.workspace, of.orders[0])
    before, after = (load_file(place / "model.safetensors") for place in (gpt_oss, folder))
    experts = [key for key in before if key.endswith(("_blocks", "_scales"))]
    assert len(experts) == 8
    assert all(torch.equal(before[key], after[key]) for key in experts)
    with open_source(gpt_oss, of.model) as source, open_decoded(folder) as artifact:
        assert set(source.headers) == set(artifact.headers)
        assert all(torch.equal(source.read(key), artifact.read(key)) for key in source.headers if ".experts." in key)
    declared = json.loads((folder / "config.json").read_text())["quantization"]
    stack = declared.get("model.layers.1.mlp.experts.up_proj", declared)
    assert stack["mode"] == "mxfp4"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlx-mxfp4", "mlx-w4-g64"])
def test_mlx_lm_computes_what_was_stored(name: str, gpt_oss: Path, tmp_path: Path) -> None:
    environment()
    of = decoded_job(gpt_oss, tmp_path, name)
    run_stage(of, Stage.QUANTIZE)
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    assert result.manifest.verdict.runtime is not None
    assert result.manifest.verdict.runtime.version.startswith("0.32.2 (mlx ")
