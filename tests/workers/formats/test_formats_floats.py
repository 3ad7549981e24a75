"""fp8, fp4 and int8 with rounded activations: round trips, bytes, what the libraries make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.workers.artifacts import IDS, is_linear, write
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats import fp8
from workers.formats.compressed_tensors import config as ct_config
from workers.formats.compressed_tensors import float4 as ct_float4
from workers.formats.compressed_tensors import module as compressed_tensors
from workers.formats.decoded import Decoded, open_decoded
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.numerics import fp8 as fp8_numerics
from workers.numerics import microscaling, rounding
from workers.numerics.codes import CodedWeight, Float4Weight, Float8Weight, IntWeight, Mxfp8Weight
from workers.spec.schemes import Float8Scheme, IntScheme, LinearScheme, MicroscalingScheme
from workers.verify.activations import rounded_inputs

SCHEMES: dict[str, LinearScheme] = {
    "tensor": Float8Scheme(type="fp8", scales="tensor", activations="none"),
    "channel": Float8Scheme(type="fp8", scales="channel", activations="dynamic"),
    "static": Float8Scheme(type="fp8", scales="tensor", activations="static"),
    "int8": IntScheme(bits=8, group_size=None, activations="int8"),
    "mxfp4": MicroscalingScheme(type="mxfp4"),
    "nvfp4": MicroscalingScheme(type="nvfp4"),
    "mxfp8": MicroscalingScheme(type="mxfp8"),
    "mxfp4-w4a4": MicroscalingScheme(type="mxfp4", activations="dynamic"),
    "nvfp4-w4a4": MicroscalingScheme(type="nvfp4", activations="dynamic"),
    "mxfp8-w8a8": MicroscalingScheme(type="mxfp8", activations="dynamic"),
}
BLOCKS = Float8Scheme(type="fp8", scales="block", activations="dynamic")


def coded(weight_OI: Tensor, scheme: Any, dtype: torch.dtype) -> CodedWeight:
    """As the maker does it, without calibration."""
    match scheme:
        case IntScheme():
            scale, _ = rounding.minmax_params(weight_OI, 8, None, symmetric=True, scale_dtype=dtype)
            return IntWeight(rounding.quantize(weight_OI, scale, None, 8), scale, None, 8, None)
        case Float8Scheme(scales=scales, activations=activations):
            static = torch.full((1,), 0.02, dtype=dtype) if activations == "static" else None
            made = torch.float32 if scales == "block" else dtype
            values, scale = fp8_numerics.quantize(weight_OI, scales, scale_dtype=made)
            return Float8Weight(values, scale, blocks=scales == "block", input_scale=static)
        case MicroscalingScheme(type="mxfp4"):
            codes, exponents = microscaling.mxfp4(weight_OI)
            return Float4Weight(codes, exponents, None)
        case MicroscalingScheme(type="mxfp8"):
            return Mxfp8Weight(*microscaling.mxfp8(weight_OI))
        case MicroscalingScheme(activations=activations):
            scale = torch.full((1,), 700.0) if activations == "dynamic" else None
            return Float4Weight(*microscaling.nvfp4(weight_OI), scale)
    raise AssertionError(scheme)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def declared(scheme: LinearScheme) -> ct_config.Declared:
    config = compressed_tensors.quantization_config({"a": scheme}, [])
    return ct_config.Declarations(config).of("a")


# ------------------------------------------------------------------------------------------- one weight


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(SCHEMES)), rows=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_encode_and_decode_are_inverse(name: str, rows: int, groups: int, seed: int) -> None:
    scheme = SCHEMES[name]
    weight = coded(random_weight(rows, 32 * groups, seed), scheme, torch.float32)
    decoded = compressed_tensors.decode(compressed_tensors.encode(weight, scheme), declared(scheme))
    torch.testing.assert_close(
        decoded.float(), weight.dequantize(), rtol=1e-2 if "fp4" in name or "mx" in name else 1e-6, atol=0
    )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_blocks_are_inverse(rows: int, columns: int, seed: int) -> None:
    weight = coded(random_weight(128 * rows, 128 * columns, seed), BLOCKS, torch.bfloat16)
    stored = fp8.encode(weight, BLOCKS)
    assert stored["weight_scale_inv"].shape == (rows, columns)
    assert torch.equal(fp8.decode(stored), weight.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_decodes_the_same(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = SCHEMES[name]
    weight = coded(random_weight(24, 96), scheme, torch.bfloat16)
    stored = compressed_tensors.encode(weight, scheme)
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"a": scheme}, []))
    library = BaseCompressor.get_value_from_registry(compressed_tensors.form_of(scheme))
    group = config.config_groups["group_0"]
    theirs = library.decompress({key: tensor.clone() for key, tensor in stored.items()}, group)["weight"]
    ours = compressed_tensors.decode(stored, declared(scheme))
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_the_bytes_of_fp4() -> None:
    """Two codes a byte, the first in the low half: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives are 0 to 15."""
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 6.0] * 2])
    weight = coded(values, SCHEMES["mxfp4"], torch.bfloat16)
    stored = ct_float4.encode(weight)  # type: ignore[arg-type]
    assert stored["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x7F] * 2]
    assert stored["weight_scale"].tolist() == [[127]]
    assert torch.equal(weight.dequantize(), values)


def test_the_bytes_of_fp8() -> None:
    """S1 E4 M3 with a bias of 7: 448 is the largest, 2^-9 the smallest."""
    values = torch.tensor([[448.0, -448.0, 1.0, 0.0, 2.0**-9, 1.125, -1.5, 240.0]])
    weight = coded(values, SCHEMES["channel"], torch.float32)
    stored = compressed_tensors.encode(weight, SCHEMES["channel"])
    assert stored["weight_scale"].tolist() == [[1.0]]
    assert stored["weight"].view(torch.uint8).tolist() == [[0x7E, 0xFE, 0x38, 0x00, 0x01, 0x39, 0xBC, 0x77]]


def test_what_is_not_whole_is_named() -> None:
    weight = coded(random_weight(8, 32), SCHEMES["nvfp4"], torch.bfloat16)
    stored = compressed_tensors.encode(weight, SCHEMES["nvfp4"])
    headers: dict[str, Any] = {name: None for name in stored if name != "weight_global_scale"}
    with pytest.raises(CheckpointError, match="weight_global_scale isn't there"):
        compressed_tensors.header(headers, stored.__getitem__, declared(SCHEMES["nvfp4"]))
    with pytest.raises(CheckpointError, match=r"stored as torch\.float32, expected float8_e4m3fn"):
        fp8.decode({"weight": torch.zeros(128, 128), "weight_scale_inv": torch.ones(1, 1)})
    odd = coded(random_weight(130, 128), BLOCKS, torch.bfloat16)
    with pytest.raises(UnsupportedRecipe, match=r"130 x 128 isn't made of whole blocks"):
        fp8.encode(odd, BLOCKS)


# ------------------------------------------------------------------------------------------- a checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 128."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(7)
    config = tf.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*SCHEMES, "block"])
def test_transformers_computes_what_we_compute(name: str, source: Path, tmp_path: Path) -> None:
    scheme, fmt = SCHEMES.get(name, BLOCKS), fp8 if name == "block" else compressed_tensors
    place = write(source, tmp_path / "q", lambda module: scheme, fmt, torch.bfloat16, coded)
    with open_decoded(place) as decoded:
        assert isinstance(decoded, Decoded)
        sources = load_file(source / "model.safetensors")
        assert decoded.quantized == {key.removesuffix(".weight") for key in sources if is_linear(key)}
        streamed = StreamedModel(place, decoded, dtype=torch.bfloat16)
        with rounded_inputs(streamed, decoded):
            hidden = stream(streamed, [IDS])
        ours = LogitsHead(streamed).logits(hidden[0]).float()
    # As users load them: in the checkpoint's own dtype.
    model, info = tf.AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    with torch.no_grad():
        theirs = model(IDS).logits.float()
    assert torch.equal(theirs, ours)
