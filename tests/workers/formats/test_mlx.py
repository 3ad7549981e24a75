"""The mlx format: its bit stream, biases, stacked experts and config.json; mlx-lm loads the same weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.planning import sizing, sources
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from tests.workers.artifacts import random_weight
from workers.checkpoint.source import Source
from workers.errors import CheckpointError, PreflightError
from workers.formats import mlx as codec
from workers.formats.decoded import Decoded, open_decoded
from workers.machine.environments import interpreter
from workers.numerics import microscaling, packing, rounding
from workers.numerics.codes import Float4Weight
from workers.quantize.one_pass import quantize
from workers.spec import mlx, recipe_base
from workers.spec.formats import MLX
from workers.spec.layers import LayerKinds
from workers.spec.recipes import Recipe
from workers.spec.runtimes import MLX_LM, checking, misfit
from workers.spec.schemes import IntScheme, MicroscalingScheme
from workers.verify.stage import verify

WIDTHS = (2, 3, 4, 5, 6, 8)
# Run in the environment mlx: the weights of every module that mlx-lm quantized, as it decodes them.
DECODE = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
from safetensors.numpy import save_file
import numpy as np
model, _ = load_model(Path(sys.argv[1]))
quantized = [(name, module) for name, module in model.named_modules() if hasattr(module, "bits") and "scales" in module]
found = {}
for name, module in quantized:
    found[name + ".weight"] = np.array(module.weight)
    for part in ("scales", "biases"):
        if module.get(part) is not None:
            found[name + "." + part] = np.array(module[part].astype(mx.float32))
model.set_dtype(mx.float32)
for name, module in quantized:
    weight = mx.dequantize(module.weight, module.scales, module.get("biases"), group_size=module.group_size,
                           bits=module.bits, mode=module.mode)
    found[name] = np.array(weight.astype(mx.float32))
save_file(found, sys.argv[2])
"""


def environment() -> Path:
    """The interpreter of the environment mlx; without it, the test is skipped."""
    try:
        return interpreter("mlx")
    except PreflightError as error:
        pytest.skip(f"no mlx-lm here: {error}")


def scheme(bits: int, group_size: int = 64, symmetric: bool = False) -> IntScheme:
    return IntScheme(bits=bits, group_size=group_size, symmetric=symmetric)


def recipe(bits: int, group_size: int = 32, symmetric: bool = False, **more: object) -> Recipe:
    own = scheme(bits, group_size, symmetric).model_dump()
    return jobs.recipe(name=f"w{bits}", method="rtn", scheme=own, format="mlx", **more)


# ------------------------------------------------------------------------------------------------ one weight


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(WIDTHS), words=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_bit_stream_is_that_of_plain_arithmetic(bits: int, words: int, seed: int) -> None:
    """A row's bytes are one number, the first code lowest."""
    codes = torch.randint(0, 1 << bits, (2, 32 * words), generator=torch.Generator().manual_seed(seed))
    stored = packing.pack(codes, bits).view(torch.uint8)
    for row, given_codes in zip(stored, codes.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(given_codes))
        assert bytes(row.tolist()) == number.to_bytes(4 * words * bits, "little")


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_symmetric_codes_go_in_bit_for_bit(bits: int, size: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(5, 2 * size, scheme(bits, size, True), dtype, seed)
    stored = codec.encode(weight, scheme(bits, size, True))
    assert stored["weight"].dtype == torch.uint32
    assert stored["scales"].dtype == stored["biases"].dtype == dtype
    decoded = codec.decode(stored, {"bits": bits, "group_size": size})
    assert torch.equal(decoded, weight.dequantize())


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(WIDTHS), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_zero_points_are_those_that_the_stored_biases_stand_for(bits: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(5, 128, scheme(bits), dtype, seed)
    assert weight.zero_OG is not None
    zero = rounding.stored_zero(weight.scale_OG, weight.zero_OG, bits)
    again = rounding.stored_zero(weight.scale_OG, zero, bits)
    torch.testing.assert_close(again, zero, rtol=0, atol=1e-4)
    assert torch.equal(rounding.biases(weight.scale_OG, zero, bits), rounding.biases(weight.scale_OG, again, bits))
    decoded = codec.decode(codec.encode(weight, scheme(bits)), {"bits": bits, "group_size": 64})
    expected = rounding.dequantize(weight.codes_OI, weight.scale_OG, zero)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4 * float(weight.scale_OG.max()))


def test_mxfp4_goes_in_bit_for_bit() -> None:
    codes_OI, exponent_OG = microscaling.mxfp4(torch.randn(6, 96, generator=torch.Generator().manual_seed(1)))
    weight = Float4Weight(codes_OI, exponent_OG, None)
    stored = codec.encode(weight, MicroscalingScheme(type="mxfp4"))
    assert list(stored) == ["weight", "scales"]
    assert torch.equal(codec.decode(stored, {"bits": 4, "group_size": 32, "mode": "mxfp4"}), weight.dequantize())


def test_nvfp4_goes_in_bit_for_bit_without_a_scale_of_the_tensor() -> None:
    w_OI = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) * 0.03
    weight = Float4Weight(*microscaling.nvfp4(w_OI, torch.ones(1)))
    stored = codec.encode(weight, MicroscalingScheme(type="nvfp4"))
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"weight": torch.uint32, "scales": torch.uint8}
    assert torch.equal(codec.decode(stored, {"bits": 4, "group_size": 16, "mode": "nvfp4"}), weight.dequantize())


def test_a_declaration_that_contradicts_the_words_is_named() -> None:
    stored = codec.encode(random_weight(4, 128, scheme(4), torch.bfloat16), scheme(4))
    with pytest.raises(CheckpointError, match="16 words for 2 groups of 64, expected 24 for the 6 bits"):
        codec.decode(stored, {"bits": 6, "group_size": 64})
    with pytest.raises(CheckpointError, match="no biases"):
        codec.decode({name: stored[name] for name in ("weight", "scales")}, {"bits": 4, "group_size": 64})


# ------------------------------------------------------------------------------------------------ names, settings


@given(
    family=st.sampled_from(sorted(mlx.STACKS)),
    layer=st.integers(0, 99),
    expert=st.integers(0, 999),
    projection=st.integers(0, 2),
    rest=st.sampled_from(["", ".weight", ".scales", ".biases"]),
)
def test_the_places_of_experts_are_undone(family: str, layer: int, expert: int, projection: int, rest: str) -> None:
    block, names = f"model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
    if family in ("mixtral", "phimoe"):
        block, names = f"model.layers.{layer}.block_sparse_moe", ("w1", "w3", "w2")
    name = f"{block}.experts.{expert}.{names[projection]}{rest}"
    place = mlx.place(family, name)
    assert place is not None
    assert place.expert == expert
    assert mlx.expert_name(family, place.name, expert) == name


def test_what_is_no_expert_keeps_its_name() -> None:
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert.up_proj.weight", "lm_head"):
        assert mlx.place("qwen2_moe", name) is None
        assert mlx.expert_name("qwen2_moe", name, 0) is None
    assert mlx.place("llama", "model.layers.0.mlp.experts.0.up_proj.weight") is None


def test_older_names_are_added_and_nothing_is_replaced() -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    config = {"rope_parameters": scaled, "num_local_experts": 8, "quantization_config": {"bits": 4}}
    assert mlx.settings(config) == {
        "quantization": {"bits": 4}, "rope_theta": 5e5, "num_experts": 8,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }  # fmt: skip
    assert "rope_theta" not in mlx.settings({**config, "rope_theta": 1e4})
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    added = mlx.settings({"rope_parameters": by_layer, "quantization_config": {}})
    assert (added["rope_theta"], added["rope_local_base_freq"]) == (1e6, 1e4)


def test_families_that_mlx_lm_lacks_are_refused_for_the_pair() -> None:
    assert checking(MLX.name) is MLX_LM
    assert misfit(MLX.name, scheme(4), LayerKinds(model_type="llama")) is None
    assert "no model; choose format: gptq" in (misfit(MLX.name, scheme(4), LayerKinds(model_type="opt")) or "")
    assert "are Conv1D" in (misfit(MLX.name, scheme(4), LayerKinds(conv1d=True, model_type="gpt2")) or "")
    experts = LayerKinds(experts=True, mixture=True, model_type="gpt_oss")
    assert "how mlx-lm stacks those wasn't tried" in (misfit(MLX.name, scheme(4), experts) or "")


def test_the_families_are_those_that_mlx_lm_has() -> None:
    code = (
        "import json, importlib.util as u, mlx_lm.utils as m\n"
        "from pathlib import Path\n"
        "names = [p.stem for p in Path(u.find_spec('mlx_lm.models').submodule_search_locations[0]).glob('*.py')]\n"
        "print(json.dumps([names, m.MODEL_REMAPPING]))"
    )
    done = subprocess.run([environment(), "-c", code], check=True, capture_output=True, text=True)
    names, renamed = json.loads(done.stdout.splitlines()[-1])
    assert {family for family in mlx.FAMILIES if renamed.get(family, family) not in names} == set()
    assert set(mlx.STACKS) <= mlx.FAMILIES


# ------------------------------------------------------------------------------------------------ an artifact


LLAMA, MIXTURE = (jobs.ZOO / "models" / name for name in ("llama-tiny", "qwen3-moe-tiny"))
OUTSIDE = {"embeddings": scheme(4, 32).model_dump(), "head": scheme(8, 64).model_dump()}
CONFIG = {
    "vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "max_position_embeddings": 128, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": tf.MixtralConfig(**CONFIG, intermediate_size=32, num_local_experts=4),
    "qwen2_moe": tf.Qwen2MoeConfig(
        **CONFIG, moe_intermediate_size=32, shared_expert_intermediate_size=64, intermediate_size=64, num_experts=4
    ),
}
MIXED = {"overrides": [{"modules": ["*.down_proj"], "scheme": scheme(6).model_dump()}]}


def made(source: Path, workspace: Path, chosen: Recipe) -> Path:
    """What is made of a source, of the size that is planned."""
    job = jobs.job(source, workspace, chosen, samples=1)
    (one,), _ = quantize(job, source)
    assert one.error is None, one.error
    planned = sizing.estimate(
        sources.resolve(ModelEntry(id=str(source)), Path()), chosen, job.calibration, job.verification
    )
    assert planned.artifact_bytes == pytest.approx(one.bytes, rel=0.02)
    return Path(one.path)


@pytest.fixture(scope="module", params=[LLAMA, MIXTURE], ids=["dense", "mixture"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and what is made of it, in several widths."""
    mixed = jobs.recipe(
        name="mixed", method="gptq", scheme=scheme(3).model_dump(), format="mlx", outside=OUTSIDE, **MIXED,
        options={"refine": 1},
    )  # fmt: skip
    return request.param, made(request.param, tmp_path_factory.mktemp("mlx"), mixed)


def test_the_artifact_reads_as_its_source(artifact: tuple[Path, Path]) -> None:
    source, place = artifact
    with open_decoded(place) as decoded, Source(source) as original:
        assert isinstance(decoded, Decoded)
        assert {k: h.shape for k, h in decoded.headers.items()} == {k: h.shape for k, h in original.headers.items()}
        outside = {"model.embed_tokens"} | ({"lm_head"} if "lm_head.weight" in original.headers else set())
        assert outside <= decoded.quantized
        for key in original.headers:
            ours, theirs = decoded.read(key).float(), original.read(key).float()
            if key.removesuffix(".weight") in decoded.quantized:
                assert float((ours - theirs).norm() / theirs.norm()) < 0.35, key
            else:
                assert torch.equal(ours, theirs), key


def test_the_files_are_as_mlx_lm_wants_them(artifact: tuple[Path, Path]) -> None:
    source, place = artifact
    with safe_open(place / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "mlx"}
    config = json.loads((place / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("bits", "group_size", "mode")} == {
        "bits": 3, "group_size": 64, "mode": "affine",
    }  # fmt: skip
    assert config["rope_theta"] == 10000.0
    assert config["quantization"]["model.embed_tokens"]["group_size"] == 32
    if source == MIXTURE:
        assert config["num_experts"] == 8
        stack = "model.layers.0.mlp.switch_mlp.down_proj"
        assert config["quantization"][stack]["bits"] == 6
        stored = load_file(place / "model.safetensors")
        assert stored[f"{stack}.weight"].shape == (8, 256, 128 * 6 // 32)
        assert not [key for key in stored if ".experts." in key]


def test_mlx_lm_loads_the_same_weights(artifact: tuple[Path, Path], tmp_path: Path) -> None:
    assert_the_same_weights(*artifact, tmp_path, parts_of_each=3)


def test_mlx_lm_loads_the_same_weights_of_nvfp4(tmp_path: Path) -> None:
    chosen = jobs.quick(shipped.recipe("mlx-nvfp4"))
    environment()
    assert_the_same_weights(MIXTURE, made(MIXTURE, tmp_path / "runs", chosen), tmp_path, parts_of_each=2)


def assert_the_same_weights(source: Path, place: Path, tmp_path: Path, *, parts_of_each: int) -> None:
    python = environment()
    subprocess.run([python, "-c", DECODE, place, tmp_path / "theirs"], check=True, cwd=tmp_path, capture_output=True)
    theirs = load_file(tmp_path / "theirs")
    family = json.loads((source / "config.json").read_text())["model_type"]
    parts = {key: part for key, part in load_file(place / "model.safetensors").items() if key in theirs}
    assert len(parts) == parts_of_each * len({key.rpartition(".")[0] for key in parts}) > 10
    for key, part in parts.items():
        ours = part if part.dtype == torch.uint32 else part.float()  # E4M3's bits are numbers, too
        assert torch.equal(theirs[key].view(torch.int32), ours.view(torch.int32)), key
    with open_decoded(place) as decoded:
        assert isinstance(decoded, Decoded)
        compared = 0
        for module in decoded.quantized:
            stacked = mlx.place(family, module)
            want = theirs[stacked.name][stacked.expert] if stacked else theirs[module]
            # One product and one sum in float32 each; a fused multiply-add may keep the product's last bits.
            _assert_same(decoded.read(f"{module}.weight"), want, module)
            compared += 1
    assert compared == len(decoded.quantized) > 10


def _assert_same(ours: Tensor, theirs: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda text: f"{name}: {text}")


def random_source(name: str, folder: Path) -> Path:
    """A small mixture with random weights, and the tokenizer of the zoo's models."""
    torch.manual_seed(7)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LLAMA / file, folder / file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_mlx_lm_computes_what_the_streamed_artifact_computes(name: str, tmp_path: Path) -> None:
    environment()
    source = random_source(name, tmp_path / name)
    job = jobs.job(source, tmp_path / "runs", recipe(4))
    quantize(job, source)
    verdict = verify(job, job.orders[0], source).verdict
    assert verdict.accepted, verdict.reasons
    assert verdict.runtime is not None
    assert verdict.runtime.version.startswith(f"{mlx.VERSION} (mlx ")
    # Both in float32; what is left is the order of sums.
    assert verdict.runtime.relative_logit_difference < 1e-4
    assert 1 <= len(verdict.generations) <= 4, "those that name people are left out"


def test_experts_of_one_stack_have_one_scheme(tmp_path: Path) -> None:
    (one,), _ = quantize(jobs.job(MIXTURE, tmp_path, recipe(4, ignore=["*.experts.1.*"])), MIXTURE)
    assert one.error is not None
    assert "stores the experts of a layer as one tensor" in one.error.message


def test_embeddings_of_an_unknown_name_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_base, "EMBEDDINGS", re.compile("nothing"))
    (one,), _ = quantize(jobs.job(LLAMA, tmp_path, recipe(4, outside=OUTSIDE)), LLAMA)
    assert one.fallbacks == (
        "left in half precision, for no name of embeddings is known that fits: model.embed_tokens",
    )


def test_shipped_recipes_quantize_what_convert_quantizes() -> None:
    for name in ("mlx-w3-g64", "mlx-w4-g64", "mlx-w6-g64", "mlx-w8-g64", "mlx-mixed-4-6", "mlx-mxfp4", "mlx-nvfp4"):
        chosen = shipped.recipe(name)
        assert chosen.scheme_outside("model.embed_tokens") is not None
        assert chosen.scheme_outside("lm_head") is not None
        assert chosen.needs.final
    assert shipped.recipe("gptq-w4-g128").scheme_outside("lm_head") is None
    with pytest.raises(ValueError, match="stay as they are in the format 'gptq'; choose format: mlx"):
        jobs.recipe(name="x", method="gptq", scheme=scheme(4).model_dump(), format="gptq", outside=OUTSIDE)
