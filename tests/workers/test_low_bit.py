"""Sources that are low-bit already, quantized from what they decode to: FP8, compressed-tensors, gptq."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf

from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.workers.jobs import ZOO, job, recipe
from workers.checkpoint.source import Source
from workers.errors import UnsupportedModel
from workers.formats.kept import DecodedSource, open_source
from workers.run import run_stage
from workers.spec.job import Job, Manifest, Stage
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

LLAMA = ZOO / "models" / "llama-tiny"
SOURCES: dict[str, Recipe | str] = {
    "fp8": "fp8-block",
    "fp8-channel": "fp8-dynamic",
    "int4": "rtn-w4-g128",
    "int8": recipe(name="int8", method="rtn", scheme={"bits": 8, "group_size": None, "activations": "int8"}),
    "nvfp4": "nvfp4-rtn",
    "mxfp8": "mxfp8",
    "gptq": recipe(name="gptq", method="rtn", scheme={"bits": 4, "group_size": 64}, format="gptq"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama-tiny as other publishers would give it, by kind."""
    work = tmp_path_factory.mktemp("quantized")
    of = job(LLAMA, work, *SOURCES.values(), samples=2)
    made = run_stage(of, Stage.QUANTIZE)
    assert [artifact.error for artifact in made.artifacts] == [None] * len(SOURCES)
    return {kind: artifact_folder(of.workspace, order) for kind, order in zip(SOURCES, of.orders, strict=True)}


def decoded_job(folder: Path, place: Path, *recipes: str | Recipe) -> Job:
    of = job(folder, place, *recipes)
    return of.model_copy(update={"model": of.model.model_copy(update={"dequantize": True})})


def accepted(of: Job, name: str) -> Manifest:
    """Quantize and verify a job of one recipe: its manifest, accepted, with a source that transformers ran, too."""
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    manifest = result.manifest
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.source_check is not None
    assert not manifest.source_check.unchecked
    return manifest


@pytest.mark.parametrize("kind", SOURCES)
def test_the_plan_knows_shapes_and_bytes_of_what_is_decoded(kind: str, quantized: dict[str, Path]) -> None:
    folder = quantized[kind]
    source = resolve(ModelEntry(id=str(folder), source="dequantize"), folder.parent)
    assert source.pin.dequantize
    assert "is the source" in source.notes[-1]
    with open_source(folder, source.pin) as opened, Source(LLAMA) as original:
        assert isinstance(opened, DecodedSource)
        planned = {tensor.name: tuple(tensor.shape) for tensor in source.tensors}
        assert planned == {name: tuple(header.shape) for name, header in opened.headers.items()}
        assert planned == {name: tuple(header.shape) for name, header in original.headers.items()}
        assert sum(tensor.bytes for tensor in source.tensors) == opened.bytes
        assert 0 <= original.bytes - opened.bytes < 10_000  # a file's header
        for name, header in opened.headers.items():
            tensor = opened.read(name)
            assert (tensor.shape, tensor.dtype) == (header.shape, header.dtype) == (header.shape, torch.bfloat16)
            error = (tensor.float() - original.read(name).float()).square().mean().sqrt()
            assert float(error) < 0.2 * float(original.read(name).float().std()) + 1e-6


@pytest.mark.parametrize("kind", ["fp8", "fp8-channel", "int4", "nvfp4"])
def test_weights_are_those_that_transformers_decodes(kind: str, quantized: dict[str, Path]) -> None:
    folder = quantized[kind]
    arguments = {} if kind == "fp8" else {"quantization_config": tf.CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint has a config of its own
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)
    theirs = model.state_dict()
    pin = job(folder, Path(), "fp8-dynamic").model.model_copy(update={"dequantize": True})
    with open_source(folder, pin) as opened:
        for name in opened.headers:
            assert torch.equal(opened.read(name), theirs[name]), name


# Whole ways through, by when they are tested.
CELLS = {
    "slow": (("fp8", "gptq-w4-g128"), ("gptq", "fp8-dynamic"), ("nvfp4", "mxfp4")),
    "night": (("fp8", "nvfp4"), ("fp8", "bnb-nf4"), ("fp8", "awq-w4-g128"), ("fp8-channel", "gptq-w8-g128")),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*p, marks=getattr(pytest.mark, mark)) for mark in ("slow", "night") for p in CELLS[mark]],
)
def test_it_is_quantized_verified_and_said(kind: str, name: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    of = decoded_job(quantized[kind], tmp_path, name)
    metrics = accepted(of, name).verdict.metrics
    assert metrics is not None
    assert 0 < metrics.kl_mean < 0.1
    folder = artifact_folder(of.workspace, of.orders[0])
    assert "the source is quantized already" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert "weight_block_size" not in config["quantization_config"]


def test_what_publishers_give_in_low_bits_alone_needs_no_word(quantized: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"is quantized already, got quant_method 'fp8'; .*source: dequantize"):
        resolve(ModelEntry(id=str(quantized["fp8"])), tmp_path)
    native = Path(shutil.copytree(quantized["fp8"], tmp_path / "native"))
    config = json.loads((native / "config.json").read_text())
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (native / "config.json").write_text(json.dumps(config))
    assert resolve(ModelEntry(id=str(native)), tmp_path).decoded == "fp8"


def test_what_cannot_be_decoded_is_refused_by_the_plan(quantized: dict[str, Path], tmp_path: Path) -> None:
    odd = Path(shutil.copytree(quantized["gptq"], tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "vptq"
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"can't be decoded: quant_method 'vptq'"):
        resolve(ModelEntry(id=str(odd), source="dequantize"), tmp_path)
