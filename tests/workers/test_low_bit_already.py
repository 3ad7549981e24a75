"""A recipe that asks for what a low-bit source has already stores the source's codes and scales, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.jobs import job, recipe
from tests.workers.test_low_bit import LLAMA, decoded_job
from tests.workers.test_low_bit import quantized as quantized
from workers.formats.decoded import open_decoded
from workers.formats.kept import open_source
from workers.run import run_stage
from workers.spec.job import Stage
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

ALL = "codes and scales are the source's own, bit for bit, for it has the recipe's scheme"
SOME = "codes and scales are the source's own, bit for bit: "
GPTQ_64 = {"bits": 4, "group_size": 64}
# Kinds of sources, and recipes that ask for what they have.
SAME: dict[str, tuple[str, Recipe | str]] = {
    "fp8": ("fp8", "fp8-block"),
    "fp8-channel": ("fp8-channel", "fp8-dynamic"),
    "int4": ("int4", "gptq-w4-g128"),
    "int8": ("int8", recipe(name="again", method="gptq", scheme={"bits": 8, "group_size": None})),
    "nvfp4": ("nvfp4", "nvfp4"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "gptq": ("gptq", recipe(name="again", method="gptq", scheme=GPTQ_64, format="gptq")),
    "gptq in compressed-tensors": ("gptq", recipe(name="again", method="gptq", scheme=GPTQ_64)),
}
# Recipes that ask for something else, in the same format.
OTHER: dict[str, tuple[str, Recipe | str]] = {
    "other groups": ("int4", recipe(name="other", method="rtn", scheme=GPTQ_64)),
    "other bits": ("int4", "gptq-w8-g128"),
    "scales for channels": ("fp8", "fp8-dynamic"),
    "a scale for inputs": ("fp8-channel", "fp8-static"),
    "global scale for inputs": ("nvfp4", "nvfp4-w4a4"),
    "folded": ("int4", "awq-w4-g128"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_it_has_already_is_stored_as_it_is(case: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    kind, name = SAME[case]
    of = decoded_job(quantized[kind], tmp_path, name)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    assert ALL in made.fallbacks
    folder = artifact_folder(of.workspace, of.orders[0])
    with open_source(quantized[kind], of.model) as source, open_decoded(folder) as artifact:
        assert set(source.headers) == set(artifact.headers)
        for key in source.headers:
            assert torch.equal(artifact.read(key).float(), open_decoded(quantized[kind]).read(key).float()), key
    if case in ("int8", "gptq in compressed-tensors"):  # weights alone, and another format
        return
    before, after = (load_file(place / "model.safetensors") for place in (quantized[kind], folder))
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


@pytest.mark.parametrize("case", OTHER)
def test_what_it_has_not_is_made_of_what_it_decodes_to(case: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    kind, name = OTHER[case]
    of = decoded_job(quantized[kind], tmp_path, name)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    assert not any(line.startswith(SOME[:40]) for line in made.fallbacks)


def test_parts_with_one_scale_in_the_runtime_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    without = ["lm_head", "*.0.self_attn.k_proj", "*.1.mlp.down_proj"]
    first = job(LLAMA, tmp_path / "1", recipe(name="some", method="rtn", scheme={"type": "nvfp4"}, ignore=without))
    assert run_stage(first, Stage.QUANTIZE).artifacts[0].error is None
    source = artifact_folder(first.workspace, first.orders[0])
    of = decoded_job(source, tmp_path / "2", recipe(name="all", method="rtn", scheme={"type": "nvfp4"}))
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    said = [line for line in made.fallbacks if line.startswith(SOME)]
    assert len(said) == 2
    before, after = (
        load_file(place / "model.safetensors") for place in (source, artifact_folder(of.workspace, of.orders[0]))
    )
    layer = "model.layers.0.self_attn"
    scales = {part: after[f"{layer}.{part}_proj.weight_global_scale"] for part in "qkv"}
    assert torch.equal(scales["q"], scales["k"])
    assert torch.equal(scales["v"], scales["k"])
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"):
        assert torch.equal(before[f"{name}.weight_packed"], after[f"{name}.weight_packed"])


@pytest.mark.slow
def test_the_manifest_says_so_and_the_artifact_is_what_the_source_decodes_to(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    of = decoded_job(quantized["fp8-channel"], tmp_path, "fp8-dynamic")
    run_stage(of, Stage.QUANTIZE)
    result = run_stage(of, Stage.VERIFY, "fp8-dynamic")
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    assert ALL in result.manifest.fallbacks
    folder = artifact_folder(of.workspace, of.orders[0])
    assert "the source's own, bit for bit" in (folder / "README.md").read_text()
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
