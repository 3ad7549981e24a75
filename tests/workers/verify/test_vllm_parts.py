"""What checks vLLM's loading without vLLM: marks, decoding of its parameters, and how parts of a layer are stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.zoo import shipped
from tests.workers import jobs
from workers.formats.decoded import Decoded, open_decoded
from workers.quantize.one_pass import quantize
from workers.spec.recipes import Recipe
from workers.spec.schemes import IntScheme
from workers.verify.runtimes import vllm_loading, vllm_reference, vllm_rounding
from workers.verify.runtimes.vllm_stored import stored_problems

LLAMA = jobs.ZOO / "models" / "llama-tiny"
RECIPES = ("rtn-w4-g128", "gptq-w3-g128", "gptq-w8-g128", "awq-w4-g128-gemm", "fp8-block", "fp8-dynamic", "w8a8-int8",
           "nvfp4", "mxfp4", "mxfp8", "asymmetric")  # fmt: skip
ASYMMETRIC = jobs.recipe(name="asymmetric", method="rtn", scheme={"bits": 4, "group_size": 128, "symmetric": False})


def of(name: str) -> Recipe:
    return ASYMMETRIC if name == ASYMMETRIC.name else shipped.recipe(name)


@given(bits=st.integers(2, 8), seed=st.integers(0, 1 << 30), words=st.integers(1, 3))
def test_a_bit_stream_is_unpacked_as_it_was_packed(bits: int, seed: int, words: int) -> None:
    count = 32 * words
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(seed))
    packed = []
    for row in codes.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        packed.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(bits * words)])
    signed = torch.tensor(packed, dtype=torch.int64).to(torch.int32)
    assert torch.equal(vllm_reference.unpacked(signed, bits), codes)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    recipes = []
    for recipe in map(of, RECIPES):
        quick = {name: 0 for name in ("refine",) if hasattr(recipe.options, name)}
        recipes.append(recipe.model_copy(update={"options": recipe.options.model_copy(update=quick)}))
    job = jobs.job(LLAMA, tmp_path_factory.mktemp("runs"), *recipes, samples=1)
    made, _ = quantize(job, LLAMA)
    assert [artifact.error for artifact in made if artifact.error] == []
    return {artifact.recipe: Path(artifact.path) for artifact in made}


def own_of(scheme: Any) -> Any:
    """What vLLM's own method or scheme of a layer knows, as far as decoding asks."""
    bits = getattr(scheme, "bits", None)
    return SimpleNamespace(
        num_bits=bits,
        group_size=getattr(scheme, "group_size", None) or -1,
        weight_block_size=[128, 128] if getattr(scheme, "scales", None) == "block" else None,
        quant_config=SimpleNamespace(weight_bits=bits),
    )


class AwqMethod(SimpleNamespace):
    """Named as vLLM's, by which the order of codes is known."""


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_decoded_as_our_decoder_does(name: str, artifacts: dict[str, Path]) -> None:
    folder, scheme = artifacts[name], of(name).scheme
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    own = own_of(scheme)
    if of(name).format == "awq":
        own = AwqMethod(**vars(own))
    with open_decoded(folder) as opened:
        assert isinstance(opened, Decoded)
        for module in sorted(opened.quantized)[:7]:
            parts = {key.removeprefix(f"{module}."): t for key, t in stored.items() if key.startswith(f"{module}.")}
            wanted = opened.read(f"{module}.weight").float()
            found = vllm_reference.decoded(parts, own, [wanted.shape[0]])
            # Ours is in the checkpoint's dtype.
            assert torch.allclose(found, wanted, rtol=2**-7, atol=1e-6), module


def test_gptq_is_read_as_symmetric() -> None:
    """qweight packs 8 codes of an output along the inputs; vLLM never looks at the zero points."""
    qweight = torch.tensor([[0x76543210]], dtype=torch.int32)
    parts = {"qweight": qweight, "scales": torch.tensor([[0.5]]), "qzeros": torch.tensor([[0]], dtype=torch.int32)}
    own = own_of(IntScheme(bits=4, group_size=8))
    assert vllm_reference.decoded(parts, own, [1]).tolist() == [[(code - 8) * 0.5 for code in range(8)]]


def test_a_fused_layer_has_the_scale_that_vllm_keeps() -> None:
    weight = torch.full((4, 16), 0x22, dtype=torch.uint8)  # 1.0 twice in a byte
    scale = torch.ones(4, 2).to(torch.float8_e4m3fn)
    parts = {"weight_packed": weight, "weight_scale": scale, "weight_global_scale": torch.tensor([2.0, 4.0])}
    assert vllm_reference.decoded(parts, own_of(None), [2, 2]).unique().tolist() == [0.25]
    parts = {"weight": torch.full((4, 16), 3.0).to(torch.float8_e4m3fn), "weight_scale": torch.tensor([1.0, 0.01])}
    rounded = vllm_reference.decoded(parts, own_of(None), [2, 2])
    assert rounded[0].tolist() == [3.0] * 16
    assert rounded[2, 0].item() == pytest.approx(0.03, rel=0.07), "to the grid of the largest scale"


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"\['codes'\] are of no format"):
        vllm_reference.decoded({"codes": torch.zeros(1)}, own_of(None), [1])
    given_ = SimpleNamespace(type="float", num_bits=6, strategy="tensor_group", dynamic=True, group_size=16)
    with pytest.raises(NotImplementedError, match="activations of 6 bits"):
        vllm_rounding.rounding_of(given_, {})


class Layer(torch.nn.Module):
    """A module with parameters of any dtype."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def layer() -> Layer:
    return Layer(
        weight=torch.zeros(4, 4, dtype=torch.bfloat16),
        weight_packed=torch.zeros(4, 2, dtype=torch.int32),
        w13_weight_scale=torch.zeros(2, 4, 3, dtype=torch.uint8),
        weight_scale_inv=torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        k_scale=torch.ones(()),
    )


@given(skipped=st.sets(st.sampled_from(["weight", "weight_packed", "w13_weight_scale", "weight_scale_inv"])))
def test_exactly_what_loading_left_is_named(skipped: set[str]) -> None:
    module = layer()
    vllm_loading.fill(module)
    assert module.k_scale.item() == 1, "has a default"
    for name, parameter in module.named_parameters():
        if name not in skipped and name != "k_scale":
            parameter.data.copy_(torch.ones(()).to(parameter.dtype).expand_as(parameter))
    assert vllm_loading.unset(module) == sorted(skipped)
    assert all(name in vllm_loading.unset_problem(sorted(skipped)) for name in skipped)


def test_scales_of_inputs_that_are_not_rounded_may_be_left() -> None:
    model = torch.nn.ModuleDict({"experts": Layer(w13_input_global_scale=torch.tensor([[1.0, 2.0]]))})
    assert len(list(vllm_loading.split_scales(model))) == 1
    vllm_loading.fill(model)
    assert vllm_loading.unset(model) == ["experts.w13_input_global_scale"]
    model["experts"].quant_method = SimpleNamespace(use_a16=True)
    assert vllm_loading.unset(model) == []
    assert list(vllm_loading.split_scales(model)) == []


def test_a_part_of_a_fused_parameter_that_was_left_is_named() -> None:
    module = layer()
    vllm_loading.fill(module)
    for parameter in module.parameters():
        parameter.data[:1].zero_() if parameter.dim() else parameter.data.zero_()
    assert vllm_loading.unset(module) == ["w13_weight_scale", "weight", "weight_packed", "weight_scale_inv"]


def test_global_scales_that_differ_within_a_fused_layer_are_named() -> None:
    same, other = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([2.0, 4.0, 2.0])
    model = torch.nn.ModuleDict({
        "same": Layer(weight_global_scale=same), "qkv": Layer(weight_global_scale=other),
        "experts": Layer(w13_weight_global_scale=torch.tensor([[1.0, 1.0], [1.0, 3.0]]),
                         w2_weight_global_scale=torch.tensor([1.0, 3.0])),
    })  # fmt: skip
    found = list(vllm_loading.split_scales(model))
    assert len(found) == 2
    assert "qkv.weight_global_scale: the parts of this fused layer have several global scales (2, 4)" in found[0]
    assert "experts.w13_weight_global_scale" in found[1]


def test_parts_of_a_fused_layer_that_are_stored_in_several_ways_are_named(artifacts: dict[str, Path]) -> None:
    for name, folder in artifacts.items():
        assert stored_problems(folder) == [], name


def test_a_scheme_of_its_own_for_v_is_named(tmp_path: Path) -> None:
    def packed(words: int) -> torch.Tensor:
        return torch.zeros(8, words, dtype=torch.int32)

    tensors = {
        f"l.0.{leaf}.weight_packed": packed(8 if leaf == "v_proj" else 4) for leaf in ("q_proj", "k_proj", "v_proj")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (problem,) = stored_problems(tmp_path)
    assert "vLLM fuses l.0.k_proj, l.0.q_proj, l.0.v_proj into one layer" in problem
    assert "l.0.v_proj: weight_packed I32[8]" in problem
