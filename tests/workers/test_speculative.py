"""Blocks that predict further tokens (MTP): kept as they are, or quantized by rounding to nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.walk.smallest import VOCABULARY, save_smallest
from tests.workers.families import save_tokenizer
from tests.workers.jobs import LOOSE, job, recipe
from workers.formats.decoded import Decoded, open_decoded
from workers.run import run_stage
from workers.spec.job import Job, Stage
from workers.spec.patterns import is_speculative
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

# How publishers call the block of a family; "after" is the number after the last layer's.
BLOCKS = {
    "qwen3_next": "mtp.layers.0",
    "qwen3_5_text": "mtp.layers.0",
    "glm4_moe": "after",
    "deepseek_v3": "after",
    "mimo_v2_flash": "model.mtp.layers.0",
}
W4 = {"bits": 4, "group_size": 32, "indivisible": "keep"}
# Random weights with random routers: a token's probability may change by any factor, which says nothing of the reading.
ANY_PERPLEXITY = LOOSE.model_copy(update={"perplexity_ratio": 1e9})


@pytest.fixture(scope="module", params=BLOCKS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small model of a family with a speculative block of its last layer's shape, and the block's name."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    save_smallest(family, folder)
    save_tokenizer(folder, VOCABULARY)
    tensors = load_file(folder / "model.safetensors")
    count = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("model.layers."))
    block = f"model.layers.{count}" if BLOCKS[family] == "after" else BLOCKS[family]
    last = f"model.layers.{count - 1}."
    torch.manual_seed(1)
    for key in [key for key in tensors if key.startswith(last)]:
        tensors[f"{block}.{key.removeprefix(last)}"] = tensors[key] * (1 + 0.1 * torch.randn_like(tensors[key].float()))
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    tensors[f"{block}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    tensors[f"{block}.enorm.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, block


def made(folder: Path, place: Path, *recipes: Recipe) -> tuple[Job, list[Path]]:
    of = job(folder, place, *recipes, samples=2, thresholds=ANY_PERPLEXITY)
    artifacts = run_stage(of, Stage.QUANTIZE).artifacts
    assert [artifact.error for artifact in artifacts] == [None] * len(recipes)
    return of, [artifact_folder(of.workspace, order) for order in of.orders]


def test_a_block_is_kept_or_quantized(checkpoint: tuple[Path, str], tmp_path: Path) -> None:
    folder, block = checkpoint
    kept, quantized = (
        recipe(name="kept", method="gptq", scheme=W4),
        recipe(name="q", method="gptq", scheme=W4, mtp="quantize"),
    )
    _, (without, with_block) = made(folder, tmp_path, kept, quantized)
    source = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if key.startswith(block)}
    before = load_file(without / "model.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in source.items())
    with open_decoded(with_block) as artifact, open_decoded(without) as plain:
        assert isinstance(artifact, Decoded)
        assert isinstance(plain, Decoded)
        coded = {module for module in artifact.quantized if module.startswith(f"{block}.")}
        # Within the block: what the last layer has in codes.
        last = block if not block.startswith("model.layers.") else f"model.layers.{int(block.rpartition('.')[2]) - 1}"
        if last != block:
            assert {m.removeprefix(f"{block}.") for m in coded} == {
                m.removeprefix(f"{last}.") for m in plain.quantized if m.startswith(f"{last}.")
            }
        assert coded == artifact.quantized - plain.quantized
        assert len(coded) >= 5
        assert set(source) <= set(artifact.headers)
        for key, tensor in source.items():
            got = artifact.read(key)
            if key.removesuffix(".weight") not in coded:
                assert torch.equal(got, tensor), key
                continue
            error = (got - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
            assert 0.01 < float(error) < 0.2
    assert f"{block}.eh_proj.weight" in load_file(with_block / "model.safetensors")
    ignored = json.loads((with_block / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"{block}.eh_proj" in ignored
    assert not coded & set(ignored)


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(family, marks=pytest.mark.slow if family in ("qwen3_next", "glm4_moe") else pytest.mark.night)
        for family in BLOCKS
    ],
    indirect=True,
)
def test_either_is_verified_and_the_card_lists_it(checkpoint: tuple[Path, str], tmp_path: Path) -> None:
    folder, block = checkpoint
    recipes = (recipe(name="kept", method="rtn", scheme=W4), recipe(name="q", method="rtn", scheme=W4, mtp="quantize"))
    of, (_, with_block) = made(folder, tmp_path, *recipes)
    for name, said in (("kept", 0), ("q", 1)):
        result = run_stage(of, Stage.VERIFY, name)
        assert result.manifest is not None, result.failure
        assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
        lines = [line for line in result.manifest.fallbacks if "speculative block rounded to nearest" in line]
        assert len(lines) == said
    assert lines[0].startswith("speculative block rounded to nearest, for no calibration text passes through it: ")
    assert f" linear layers ({block}." in lines[0]
    assert lines[0] in (with_block / "README.md").read_text()


def test_blocks_of_fp8_are_quantized_too(checkpoint: tuple[Path, str], tmp_path: Path) -> None:
    folder, block = checkpoint
    scheme = {"type": "fp8", "scales": "channel", "activations": "dynamic"}
    _, (place,) = made(folder, tmp_path, recipe(name="fp8", method="rtn", scheme=scheme, mtp="quantize"))
    tensors = load_file(place / "model.safetensors")
    coded = [key for key, tensor in tensors.items() if key.startswith(block) and tensor.dtype == torch.float8_e4m3fn]
    assert len(coded) >= 5


def test_what_runtimes_fuse_in_a_block_shares_its_global_scale(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_smallest("qwen3_5_text", folder)
    save_tokenizer(folder, VOCABULARY)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.startswith("model.layers.1.mlp.")]:
        changed = tensors[key] * (3.0 if ".up_proj." in key else 1.0)
        tensors[key.replace("model.layers.1.", "mtp.layers.0.")] = changed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, (place,) = made(folder, tmp_path, recipe(name="nv", method="rtn", scheme={"type": "nvfp4"}, mtp="quantize"))
    stored = load_file(place / "model.safetensors")
    up, gate = (stored[f"mtp.layers.0.mlp.{part}_proj.weight_global_scale"] for part in ("up", "gate"))
    assert torch.equal(up, gate)
    assert not torch.equal(up, stored["model.layers.1.mlp.up_proj.weight_global_scale"])


def test_a_model_without_a_block_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_smallest("llama", folder)
    save_tokenizer(folder, VOCABULARY)
    of = job(folder, tmp_path, recipe(name="q", method="rtn", scheme=W4, mtp="quantize"))
    said = run_stage(of, Stage.QUANTIZE).artifacts[0].fallbacks
    assert "mtp: quantize: the checkpoint has no speculative block with linear layers as its decoder's" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "rtn", "scheme": W4 | {"indivisible": "refuse"}, "format": "gptq"},
            "model's own layers alone; choose",
        ),
        (
            {"method": "rtn", "scheme": {"type": "fp8", "activations": "static"}},
            "no text passes through the speculative",
        ),
        ({"method": "gptq", "scheme": {"type": "nvfp4", "activations": "dynamic"}}, "no text passes through the spec"),
    ],
)
def test_what_a_block_cannot_have_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(name="q", mtp="quantize", **given)


@given(st.integers(0, 200), st.integers(1, 100))
def test_layers_after_the_last_are_speculative(number: int, count: int) -> None:
    assert is_speculative(f"model.layers.{number}.mlp.gate_proj.weight", count) == (number >= count)
    assert is_speculative(f"model.mtp_layers.{number}.mlp.gate_proj.weight", count)
    assert is_speculative(f"mtp.layers.{number}.mlp.gate_proj", count)
    assert not is_speculative(f"model.visual.blocks.{number}.mlp.gate_proj.weight", count)
