"""compressed-tensors' integers, and any checkpoint as it is opened; the library and transformers read the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.workers.artifacts import (
    assert_transformers_agrees,
    is_linear,
    make_sources,
    random_weight,
    scheme,
    value_of,
    write,
)
from workers.checkpoint.source import Source
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats import awq, gptq
from workers.formats.compressed_tensors import module as compressed_tensors
from workers.formats.compressed_tensors import packed as ct_packed
from workers.formats.compressed_tensors.config import Declared
from workers.formats.compressed_tensors.module import Declarations
from workers.formats.decoded import Decoded, open_decoded
from workers.spec.schemes import IntScheme


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


# ------------------------------------------------------------------------------------------------ one weight


def packed(bits: int, group_size: int | None, symmetric: bool = True) -> Declared:
    return Declared("pack-quantized", "int", bits, "none", group_size, symmetric)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 9), groups=st.integers(1, 4), width=st.integers(1, 40),
    symmetric=st.booleans(),
)  # fmt: skip
def test_compressed_tensors_is_a_bijection(bits: int, rows: int, groups: int, width: int, symmetric: bool) -> None:
    chosen = scheme(bits, width, symmetric=symmetric)
    weight = random_weight(rows, groups * width, chosen, torch.bfloat16, seed=width)
    stored = compressed_tensors.encode(weight, chosen)
    decoded = compressed_tensors.decode(stored, packed(bits, width, symmetric))
    assert torch.equal(decoded, value_of(weight, torch.bfloat16))
    codes = ct_packed.codes(stored, bits, symmetric=symmetric)
    assert torch.equal(codes.codes_OI, weight.codes_OI)
    assert (codes.zero_OG is None) is symmetric
    assert symmetric or torch.equal(codes.zero_OG, weight.zero_OG)


def test_zero_points_of_another_width_are_refused() -> None:
    chosen = scheme(4, 32, symmetric=False)
    stored = compressed_tensors.encode(random_weight(24, 64, chosen, torch.bfloat16), chosen)
    stored["weight_zero_point"] = torch.zeros(24, 2, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"zero points of shape \(24, 2\), expected \(3, 2\) for 24 outputs"):
        compressed_tensors.decode(stored, packed(4, 32, symmetric=False))


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize(("bits", "symmetric"), [*((bits, True) for bits in range(2, 9)), (4, False), (8, False)])
def test_compressed_tensors_writes_the_same_tensors(bits: int, symmetric: bool, group_size: int | None) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    chosen = scheme(bits, group_size, symmetric=symmetric)
    weight = random_weight(24, 96, chosen, torch.bfloat16)
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"a": chosen}, []))
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    # float32, or the library's own division by the scale moves codes of 8 bits.
    state = {"weight": value_of(weight, torch.float32), "weight_scale": weight.scale_OG}
    if weight.zero_OG is not None:
        state["weight_zero_point"] = weight.zero_OG
    want = library.compress(state, config.config_groups["group_0"])
    got = compressed_tensors.encode(weight, chosen)
    assert list(got) == [*ct_packed.NAMES, *([] if symmetric else [ct_packed.ZEROS])]
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    decompressed = library.decompress(got, config.config_groups["group_0"])["weight"]
    assert torch.equal(compressed_tensors.decode(got, packed(bits, group_size, symmetric)), decompressed)


# ------------------------------------------------------------------------------------------- a checkpoint


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_transformers_loads_every_width(
    name: str, bits: int, group_size: int | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    write(sources[name], tmp_path / "q", lambda module: scheme(bits, group_size), compressed_tensors)
    assert_transformers_agrees(tmp_path / "q", sources[name], tmp_path / "f")


def test_transformers_loads_mixtral(sources: dict[str, Path], tmp_path: Path) -> None:
    write(sources["mixtral"], tmp_path / "q", lambda module: scheme(4, 32), compressed_tensors)
    assert_transformers_agrees(tmp_path / "q", sources["mixtral"], tmp_path / "f")


@pytest.mark.parametrize("fallback", [scheme(4, None), None])
def test_transformers_loads_layers_that_deviate(
    fallback: IntScheme | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {True: fallback, False: scheme(4, 64)}
    write(sources["odd"], tmp_path / "q", lambda module: chosen["down_proj" in module], compressed_tensors)
    assert_transformers_agrees(tmp_path / "q", sources["odd"], tmp_path / "f")


def test_the_config_says_what_is_quantized_and_how() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    names = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("up_proj", "down_proj")]
    schemes = {name: scheme(4, None if name == names[1] else 64) for name in names}
    config = compressed_tensors.quantization_config(schemes, ["lm_head", "model.layers.0.mlp.gate_proj"])
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate_proj"]
    groups = [
        (g["targets"], g["weights"]["strategy"], g["weights"]["group_size"]) for g in config["config_groups"].values()
    ]
    assert groups == [(["Linear"], "group", 64), ([names[1]], "channel", None)]
    assert_within(config, {**QuantizationConfig.model_validate(config).model_dump(mode="json"), "version": "0.20.0"})
    assert [Declarations(config).of(name).bits for name in names] == [4] * 4


def assert_within(ours: dict[str, Any], library: dict[str, Any]) -> None:
    """Every key that we write is one that the library knows, with the value that it would write."""
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_within(value, library[key])
        else:
            assert value == library[key], key


EXPERTS = [f"model.layers.0.mlp.experts.{i}.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]


def test_experts_that_deviate_are_refused() -> None:
    everything = {name: scheme(4, 64) for name in ["model.layers.0.self_attn.q_proj", *EXPERTS]}
    compressed_tensors.quantization_config(everything, [])
    with pytest.raises(UnsupportedRecipe, match=r"experts\.0\.down_proj.*choose a group_size"):
        compressed_tensors.quantization_config(
            {name: scheme(4, None) if "down" in name else chosen for name, chosen in everything.items()}, []
        )
    attention = {"model.layers.0.self_attn.q_proj": scheme(4, 64)}
    with pytest.raises(UnsupportedRecipe, match=r"and 3 more deviate.*don't ignore them"):
        compressed_tensors.quantization_config(attention, EXPERTS)


@pytest.mark.parametrize("fmt", [compressed_tensors, gptq.V1, gptq.V2, awq])
def test_conv1d_is_refused(fmt: Any) -> None:
    with pytest.raises(UnsupportedRecipe, match=r"h\.0\.attn\.c_attn.* Conv1D.*choose method: bitsandbytes"):
        fmt.quantization_config({"transformer.h.0.attn.c_attn": scheme(4, 64)}, [], ["transformer.h.0.attn.c_attn"])


# ------------------------------------------------------------------------------------------------- open_decoded


@pytest.fixture(params=[compressed_tensors, gptq.V1, gptq.V2, awq])
def opened(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path: Path
) -> Iterator[tuple[Decoded, Source]]:
    chosen = scheme(4, 32, symmetric=request.param is not awq)
    write(sources["llama"], tmp_path / "q", lambda module: chosen, request.param, torch.float16)
    with open_decoded(tmp_path / "q") as decoded, Source(sources["llama"]) as original:
        assert isinstance(decoded, Decoded)
        yield decoded, original


def test_decoded_has_the_keys_and_shapes_of_its_source(opened: tuple[Decoded, Source]) -> None:
    decoded, original = opened
    assert {name: h.shape for name, h in decoded.headers.items()} == {n: h.shape for n, h in original.headers.items()}
    assert decoded.quantized == {n.removesuffix(".weight") for n in original.headers if is_linear(n)}
    assert decoded.bytes < original.bytes
    for name, header in decoded.headers.items():
        tensor, want = decoded.read(name), original.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == (header.shape, header.dtype), name
        assert tensor.is_contiguous()
        if name.removesuffix(".weight") in decoded.quantized:
            assert header.dtype.is_floating_point
            assert 0 < (tensor - want).abs().max() < 0.2 * want.abs().max()
        else:
            assert torch.equal(tensor, want)


def test_decoded_has_no_tensors_of_its_storage(opened: tuple[Decoded, Source]) -> None:
    decoded, _ = opened
    assert not any("packed" in name or name.endswith((".qweight", ".scales")) for name in decoded.headers)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.missing\.weight'"):
        decoded.read("model.missing.weight")


def test_a_float_checkpoint_is_opened_as_it_is(sources: dict[str, Path]) -> None:
    with open_decoded(sources["llama"]) as source:
        assert isinstance(source, Source)


def config_only(folder: Path, quantization: dict[str, Any]) -> Path:
    save_file({"a.weight_packed": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        open_decoded(tmp_path)
    with pytest.raises(UnsupportedRecipe, match=r"'aqlm'.*awq, bitsandbytes, compressed-tensors, fp8, gguf, gptq"):
        open_decoded(config_only(tmp_path, {"quant_method": "aqlm"}))
    with pytest.raises(UnsupportedRecipe, match="checkpoint_format 'marlin'"):
        open_decoded(config_only(tmp_path, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}))
    with pytest.raises(UnsupportedRecipe, match="version 'gemv' with 4 bits"):
        open_decoded(config_only(tmp_path, {"quant_method": "awq", "bits": 4, "version": "gemv"}))


def test_a_weight_that_is_not_whole_is_named(tmp_path: Path) -> None:
    quantization = compressed_tensors.quantization_config({"a": scheme(4, 32)}, [])
    with pytest.raises(CheckpointError, match="a: quantized, but its weight_scale, weight_shape isn't there"):
        open_decoded(config_only(tmp_path, quantization))


def test_other_kinds_of_compressed_tensors_are_named() -> None:
    config = compressed_tensors.quantization_config({"model.layers.0.up_proj": scheme(4, 32)}, [])
    weights = config["config_groups"]["group_0"]["weights"]
    weights["strategy"] = "tensor"
    with pytest.raises(UnsupportedRecipe, match=r"up_proj: can't decode .*'strategy': 'tensor'"):
        Declarations(config).of("model.layers.0.up_proj")
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    with pytest.raises(UnsupportedRecipe, match="no config group targets it"):
        Declarations(config).of("model.layers.0.up_proj")
    weights["strategy"] = "group"
    assert Declarations(config).of("model.layers.0.down_proj").bits == 4
