"""Rounded inputs, and cached keys and values, in vLLM's reference arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.formats.compressed_tensors.config import quantization_config
from workers.numerics import activations
from workers.spec.schemes import Float8Scheme, IntScheme, LinearScheme, MicroscalingScheme
from workers.verify.runtimes import vllm_loading, vllm_reference, vllm_rounding

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def inputs(seed: int, size: float) -> Tensor:
    made = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)) * size
    made[0, :32] = 0
    return made


def rounding(scheme: LinearScheme, **parameters: Tensor) -> vllm_rounding.Rounding:
    """The rounding that our config.json declares, of its dictionary as vLLM parses it."""
    config = quantization_config({"model.layers.0.mlp.up_proj": scheme}, [])
    given_ = config["config_groups"]["group_0"]["input_activations"]
    return vllm_rounding.rounding_of(given_ and SimpleNamespace(**given_), parameters)


SEEDS, SIZES = st.integers(0, 1 << 30), st.floats(1e-3, 1e3)


@given(seed=SEEDS)
def test_e2m1_is_the_nearest_number(seed: int) -> None:
    x = inputs(seed, 3)
    found = vllm_rounding.to_e2m1(x)
    assert set(found.abs().unique().tolist()) <= set(E2M1.tolist())
    nearest = (x.abs().unsqueeze(-1) - E2M1).abs().amin(-1)
    assert torch.equal((found.abs() - x.abs()).abs(), nearest)
    assert torch.equal(found[x.abs() > 0.3].sign(), x[x.abs() > 0.3].sign())


def test_ties_go_to_the_even_code() -> None:
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    assert vllm_rounding.to_e2m1(-ties).tolist() == [-0.0, -1, -1, -2, -2, -4, -4]


@given(seed=SEEDS, size=SIZES)
def test_mxfp4_is_rounded_as_our_decoder_does(seed: int, size: float) -> None:
    x = inputs(seed, size)
    assert torch.equal(rounding(MicroscalingScheme(type="mxfp4", activations="dynamic"))(x), activations.round_mxfp4(x))


@given(seed=SEEDS, size=SIZES)
def test_mxfp8_clips_nothing(seed: int, size: float) -> None:
    """vLLM's exponent is the least that clips nothing; compressed-tensors', which ours is, may clip."""
    x = inputs(seed, size)
    found = rounding(MicroscalingScheme(type="mxfp8", activations="dynamic"))(x)
    largest = x.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
    assert bool(((found - x).abs() <= x.abs() / 16 + largest * 2**-15).all())


@given(seed=SEEDS, size=SIZES)
def test_nvfp4_is_rounded_as_our_decoder_does(seed: int, size: float) -> None:
    x = inputs(seed, size)
    divisor = 448 * 6 / x.abs().max()
    # q, k and v of one layer: vLLM takes the largest of their divisors.
    given_ = rounding(
        MicroscalingScheme(type="nvfp4", activations="dynamic"), input_global_scale=torch.stack([divisor / 2, divisor])
    )
    ours = activations.round_nvfp4(x, divisor)
    differ = ~torch.isclose(given_(x), ours, rtol=1e-5, atol=0)
    assert differ.float().mean() < 0.01, "alone where a last bit decides a tie"


def test_inputs_of_eight_bits() -> None:
    x = inputs(1, 2)
    token = rounding(Float8Scheme())(x)
    torch.testing.assert_close(token, activations.round_fp8_token(x))
    scale = torch.tensor([0.01])
    fixed = rounding(Float8Scheme(scales="tensor", activations="static"), input_scale=scale)(x)
    torch.testing.assert_close(fixed, activations.round_fp8_static(x, scale))
    assert fixed.abs().max() <= 4.48
    whole = rounding(IntScheme(bits=8, group_size=None, activations="int8"))(x)
    torch.testing.assert_close(whole, activations.round_int8_token(x), atol=x.abs().max().item() / 100, rtol=0)
    assert rounding(MicroscalingScheme(type="nvfp4"))(x) is x


class Attention(torch.nn.Module):
    """An attention layer with vLLM's names, which returns what it would cache."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("k_scale", "v_scale", "q_scale"):
            self.register_parameter(name, torch.nn.Parameter(torch.ones(1), requires_grad=False))

    def forward(self, query: Any, key: Any, value: Any) -> Any:
        return key, value


@given(st.sets(st.sampled_from(["k_scale", "v_scale"])))
def test_scales_of_a_cache_that_were_not_loaded_are_named(skipped: set[str]) -> None:
    model = torch.nn.ModuleDict({"attn": Attention(), "head": torch.nn.Linear(2, 2)})
    vllm_loading.expect_cache_scales(model, declared=True)
    vllm_loading.fill(model["attn"])
    for name in {"k_scale", "v_scale"} - skipped:
        getattr(model["attn"], name).data.fill_(0.5)
    assert vllm_loading.unset(model["attn"]) == sorted(skipped)


@pytest.mark.parametrize("declared", [True, False])
def test_keys_and_values_are_rounded_under_the_scales_that_were_loaded(declared: bool) -> None:
    model = torch.nn.ModuleDict({"attn": Attention()})
    vllm_loading.expect_cache_scales(model, declared)
    model["attn"].k_scale.data.fill_(0.02)
    model["attn"].v_scale.data.fill_(0.5)
    vllm_reference.round_cached(model)
    keys, values = inputs(1, 1), inputs(2, 1)
    found = model["attn"](None, keys, value=values)
    wanted = (activations.round_fp8_static(keys, torch.tensor(0.02)),
              activations.round_fp8_static(values, torch.tensor(0.5)))  # fmt: skip
    for tensor, rounded, given_ in zip(found, wanted, (keys, values), strict=True):
        torch.testing.assert_close(tensor, rounded if declared else given_)
