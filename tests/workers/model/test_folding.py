"""Folding pairs: found in every family without a table, proven, and a folded model computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.workers.families import save_random, save_tokenizer
from tests.workers.jobs import job, recipe
from workers.checkpoint.source import Source
from workers.formats.folded import Folded
from workers.methods.layer import FoldableInput
from workers.model.folding import Fold, find_folds, fold_source
from workers.model.forward import LogitsHead, Streaming, stream
from workers.model.loading import QuantizableWeight, StreamedModel
from workers.quantize.one_pass import quantize
from workers.spec.schemes import IntScheme
from workers.spec.workspace import artifact_folder, folds_folder

GATED = {"mlp.up_proj": ["mlp.down_proj"]}
ATTENTION = {"self_attn.v_proj": ["self_attn.o_proj"]}
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
BOTH = ["mlp.gate_proj", "mlp.up_proj"]
MLA = {
    "input_layernorm": ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
    "self_attn.q_a_layernorm": ["self_attn.q_b_proj"],
    "self_attn.kv_a_layernorm": ["self_attn.kv_b_proj"],
    "self_attn.kv_b_proj": ["self_attn.o_proj"],
}
EXPERTS = ["mlp.experts.gate_up_proj"] * 4
ROUTED = {"mlp.experts.gate_up_proj": ["mlp.experts.down_proj"]}

# What each family's last layer can fold, by its architecture.
EXPECTED: dict[str, dict[str, list[str]]] = {
    "llama": {"input_layernorm": QKV, "post_attention_layernorm": BOTH, **GATED, **ATTENTION},
    "qwen3": {"input_layernorm": QKV, "post_attention_layernorm": BOTH, **GATED, **ATTENTION},
    "gemma2": {"input_layernorm": QKV, "pre_feedforward_layernorm": BOTH, **GATED, **ATTENTION},
    "gemma3": {"input_layernorm": QKV, "pre_feedforward_layernorm": BOTH, **GATED, **ATTENTION},
    # Norms only after attention and the feed-forward part: their outputs go into the residual stream.
    "olmo2": {**GATED, **ATTENTION},
    "cohere": {"input_layernorm": QKV + BOTH, **GATED, **ATTENTION},
    "phi3": {
        "input_layernorm": ["self_attn.qkv_proj"],
        "post_attention_layernorm": ["mlp.gate_up_proj"],
        "mlp.gate_up_proj": ["mlp.down_proj"],
        "self_attn.qkv_proj": ["self_attn.o_proj"],
    },
    "gpt2": {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"], "attn.c_attn": ["attn.c_proj"]},
    "gpt_neox": {
        "input_layernorm": ["attention.query_key_value"],
        "post_attention_layernorm": ["mlp.dense_h_to_4h"],
        "attention.query_key_value": ["attention.dense"],
    },
    "falcon": {
        "input_layernorm": ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        "self_attention.query_key_value": ["self_attention.dense"],
    },
    "bloom": {
        "input_layernorm": ["self_attention.query_key_value"],
        "post_attention_layernorm": ["mlp.dense_h_to_4h"],
        "self_attention.query_key_value": ["self_attention.dense"],
    },
    # ReLU lets a positive scale through.
    "opt": {
        "self_attn_layer_norm": QKV,
        "final_layer_norm": ["fc1"],
        "fc1": ["fc2"],
        "self_attn.v_proj": ["self_attn.out_proj"],
    },
    "qwen3_moe": {"input_layernorm": QKV, "post_attention_layernorm": ["mlp.gate", *EXPERTS], **ROUTED, **ATTENTION},
    "mixtral": {"input_layernorm": QKV, "post_attention_layernorm": ["mlp.gate", *EXPERTS], **ROUTED, **ATTENTION},
    "deepseek_v3": {
        **MLA,
        "post_attention_layernorm": [
            "mlp.gate",
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
            *EXPERTS,
        ],
        **ROUTED,
        "mlp.shared_experts.up_proj": ["mlp.shared_experts.down_proj"],
    },
    "mamba": {"norm": ["mixer.in_proj"]},
}


def last_layer(
    folder: Path,
    look: Callable[[nn.Module, str, Callable[[], Any], list[QuantizableWeight]], None],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Show the last layer of a model, loaded, with a function that runs it."""
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=dtype)
        tokens = torch.randint(3, 96, (1, 32), generator=torch.Generator().manual_seed(2))
        with Streaming(streamed) as streaming:
            lanes = streaming.lanes([tokens])
            for layer in streaming.layers():
                if layer.index == len(streamed.layers) - 1:
                    weights = [weight for weight in streamed.weights if weight.layer == layer.index]
                    prefix = f"{streamed.layers_name}.{layer.index}"
                    look(streamed.layers[layer.index], prefix, lanes.float32_run(), weights)
                lanes.advance()


def names(folds: list[Fold], prefix: str) -> dict[str, list[str]]:
    short = lambda name: name.removeprefix(f"{prefix}.").removesuffix(".weight")  # noqa: E731
    found: dict[str, list[str]] = {}
    for fold in folds:
        found.setdefault(short(fold.source), [short(sink.parameter) for sink in fold.sinks])
    return found


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in EXPECTED),
        # As a GPU holds them: a router that computes in float32 with a copy of its weight, products that underflow.
        *((family, dtype) for family in ("llama", "deepseek_v3") for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_the_pairs_of_each_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_random(family, tmp_path)

    def look(layer: nn.Module, prefix: str, run: Callable[[], Any], weights: list[QuantizableWeight]) -> None:
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        folds = find_folds(layer, prefix, run, weights)
        got = {source: sorted(sinks) for source, sinks in names(folds, prefix).items()}
        assert got == {source: sorted(sinks) for source, sinks in EXPECTED[family].items()}
        kinds = {fold.kind for fold in folds}
        assert kinds <= ({"unit-offset-norm", "linear"} if "gemma" in family else {"norm", "linear"})
        after = layer.state_dict()
        assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    last_layer(tmp_path, look, dtype)


class Odd(nn.Module):
    """A layer whose norm's output also goes where no weight can take the scales back."""

    def __init__(self, leak: bool, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self._leak = leak
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        made: Tensor = self.down(self._activation(self.up(normed)))
        return made + (normed if self._leak else x)


@pytest.mark.parametrize(
    ("leak", "activation", "sources"),
    [
        (False, torch.relu, {"norm", "up"}),
        (True, torch.relu, {"up"}),
        (False, nn.functional.gelu, {"norm"}),
        (False, lambda x: torch.relu(x).square(), {"norm"}),
        (False, lambda x: x, {"norm", "up"}),
        (True, nn.functional.silu, set()),
        # Far from anything that a few tokens reach.
        (False, lambda x: x.clamp(-100, 100), {"norm"}),
        (False, lambda x: torch.where(x.abs() < 1e-4, 0, x), {"norm"}),
    ],
)
def test_what_does_not_carry_a_scale_is_left_alone(
    leak: bool, activation: Callable[[Tensor], Tensor], sources: set[str]
) -> None:
    torch.manual_seed(3)
    layer, x = Odd(leak, activation), torch.randn(2, 8, 16)
    weights = [
        QuantizableWeight(f"{name}.weight", 0, (f"l.{name}.weight", None), (o, i), False)
        for name, o, i in (("up", 32, 16), ("down", 16, 32))
    ]
    with torch.inference_mode():
        folds = find_folds(layer, "l", lambda: layer(x), weights)
    assert {fold.source.removeprefix("l.") for fold in folds} == sources


def test_a_layer_that_is_never_the_same_is_left_alone() -> None:
    layer = Odd(False, lambda x: x + torch.rand(()))
    weights = [QuantizableWeight("up.weight", 0, ("l.up.weight", None), (32, 16), False)]
    with torch.inference_mode():
        assert find_folds(layer, "l", lambda: layer(torch.ones(1, 4, 16)), weights) == []


@pytest.mark.parametrize("kind", ["norm", "unit-offset-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divided_norm_says_what_rounding_made_of_its_scales(kind: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, generator=generator).to(dtype)
    weight[3] = -1.0 if kind == "unit-offset-norm" else 0.0
    bias = torch.randn(64, generator=generator).to(dtype)
    scale = torch.rand(64, generator=generator) * 4 + 0.1
    offset = 1.0 if kind == "unit-offset-norm" else 0.0
    new, new_bias, effective = fold_source(kind, weight, bias, scale)
    assert new_bias is not None
    assert (new.dtype, new_bias.dtype) == (dtype, dtype)
    assert bool((effective > 0).all())
    assert bool(effective.isfinite().all())
    torch.testing.assert_close((new.float() + offset) * effective, weight.float() + offset, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(effective, scale, rtol=0.3 if dtype == torch.bfloat16 else 1e-4, atol=0)


FOLDED = ["llama", "gemma2", "phi3", "gpt_neox", "mamba"]


# transformers loads no experts with int8 activations, and none of Falcon's layers packed: the maker refuses them.
@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("awq", name) for name in [*FOLDED, "qwen3_moe", "deepseek_v3"]),
        *(("smoothquant", name) for name in [*FOLDED, "falcon"]),
    ],
)
def test_a_folded_model_computes_what_it_computed(method: str, family: str, tmp_path: Path) -> None:
    """The whole way: scales chosen and folded by the engine, undone on the source by what it kept of them."""
    save_random(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    scheme: dict[str, Any] = {"bits": 4, "group_size": 8, "indivisible": "channel"}
    if method == "smoothquant":
        scheme = {"bits": 8, "group_size": None, "activations": "int8"}
    made_by = recipe(name="folds", method=method, scheme=scheme)
    of = job(tmp_path / "model", tmp_path / "work", made_by)
    (made,), _ = quantize(of, tmp_path / "model")
    assert made.error is None
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))
    with Source(tmp_path / "model") as source:
        streamed = StreamedModel(tmp_path / "model", source, dtype=torch.float32)
        transposed = frozenset(weight.key for weight in streamed.weights if weight.transposed)
        folded = Folded(source, folds_folder(artifact_folder(of.workspace, of.orders[0])), transposed)
        assert folded.changed
        other = StreamedModel(tmp_path / "model", folded, dtype=torch.float32)
        want, got = (LogitsHead(m).logits(stream(m, [tokens])[0]) for m in (streamed, other))
    # A sum of products in another order of magnitude: float32's own noise, and no more.
    assert (got - want).abs().max() < 2e-4 * want.std()


@given(channels=st.integers(1, 30), copies=st.integers(1, 8), seed=st.integers(0, 1 << 30))
def test_columns_of_one_channel_get_one_value_by_sums_in_order(channels: int, copies: int, seed: int) -> None:
    """As grouped queries share a channel of v; the reference is a scatter, which on the CPU adds in order."""
    generator = torch.Generator().manual_seed(seed)
    rows_I = torch.arange(channels).repeat_interleave(copies)[torch.randperm(channels * copies, generator=generator)]
    values_I = torch.rand(len(rows_I), generator=generator)
    foldable = FoldableInput(rows_I, [], [], IntScheme(bits=4, group_size=None), lambda weight: values_I)
    hows: tuple[tuple[Literal["mean", "max"], str], ...] = (("mean", "mean"), ("max", "amax"))
    for how, scattered in hows:
        want = torch.zeros(channels).scatter_reduce_(0, rows_I, values_I, scattered, include_self=False)[rows_I]
        assert torch.equal(foldable.tied(values_I, how), want)
