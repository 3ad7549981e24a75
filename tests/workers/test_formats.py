"""The stored formats: encode and decode are inverse, the library that owns a format reads it, transformers loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from workers.checkpoint import Source
from workers.codes import IntWeight
from workers.errors import CheckpointError, NumericalError, UnsupportedRecipe
from workers.formats import compressed_tensors, gptq
from workers.formats.decoded import Decoded, open_decoded
from workers.recipes import IntScheme

SMALL = {"vocab_size": 96, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
DENSE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, **DENSE, intermediate_size=128),
    # 32 divides its width, 64 doesn't.
    "odd": LlamaConfig(**SMALL, **DENSE, intermediate_size=160),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, **DENSE, moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": MixtralConfig(**SMALL, **DENSE, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2),
}
IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


def scheme(bits: int, group_size: int | None, symmetric: bool = True) -> IntScheme:
    return IntScheme(bits=bits, group_size=group_size, symmetric=symmetric)


def round_to_nearest(weight_OI: Tensor, chosen: IntScheme, dtype: torch.dtype) -> IntWeight:
    rows, columns = weight_OI.shape
    w = weight_OI.float().view(rows, -1, chosen.group_size or columns)
    low, high = -(2 ** (chosen.bits - 1)), 2 ** (chosen.bits - 1) - 1
    if chosen.symmetric:
        scale = (w.abs().amax(-1) * 2 / (high - low)).to(dtype)
        zero = None
    else:
        scale = ((w.amax(-1) - w.amin(-1)) / (high - low)).to(dtype)
        zero = (low - w.amin(-1) / scale.float()).round().clamp(low + 1, high).to(torch.int8)
    offset = 0 if zero is None else zero.float()[:, :, None]
    codes = (w / scale.float()[:, :, None] + offset).round().clamp(low, high)
    return IntWeight(codes.to(torch.int8).view(rows, columns), scale, zero, chosen.bits, chosen.group_size)


def random_weight(rows: int, columns: int, chosen: IntScheme, dtype: torch.dtype, seed: int = 0) -> IntWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight, chosen, dtype)


def value_of(weight: IntWeight, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, column by column."""
    group = torch.arange(weight.codes_OI.shape[1]) // (weight.group_size or weight.codes_OI.shape[1])
    zero = 0 if weight.zero_OG is None else weight.zero_OG[:, group].int()
    return (weight.codes_OI.int() - zero).to(dtype) * weight.scale_OG[:, group].to(dtype)


# ------------------------------------------------------------------------------------------------ one weight

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda s: (32 * s[0], 32 * s[1]))


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 9), groups=st.integers(1, 4), width=st.integers(1, 40))
def test_compressed_tensors_is_a_bijection(bits: int, rows: int, groups: int, width: int) -> None:
    weight = random_weight(rows, groups * width, scheme(bits, width), torch.bfloat16, seed=width)
    stored = compressed_tensors.encode(weight)
    decoded = compressed_tensors.decode(stored, bits)
    assert torch.equal(decoded, value_of(weight, torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), shape=SHAPES, symmetric=st.booleans(), whole_row=st.booleans())
def test_gptq_is_a_bijection(bits: int, shape: tuple[int, int], symmetric: bool, whole_row: bool) -> None:
    chosen = scheme(bits, None if whole_row else 32, symmetric)
    weight = random_weight(*shape, chosen, torch.float16, seed=sum(shape))
    stored = gptq.encode(weight)
    assert torch.equal(gptq.decode(stored, bits), value_of(weight, torch.float16))


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_writes_the_same_tensors(bits: int, group_size: int | None) -> None:
    chosen = scheme(bits, group_size)
    weight = random_weight(24, 96, chosen, torch.bfloat16)
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"a": chosen}, []))
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    # float32, or the library's own division by the scale moves codes of 8 bits.
    state = {"weight": value_of(weight, torch.float32), "weight_scale": weight.scale_OG}
    want = library.compress(state, config.config_groups["group_0"])
    got = compressed_tensors.encode(weight)
    assert list(got) == list(compressed_tensors.SUFFIXES)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    decompressed = library.decompress(got, config.config_groups["group_0"])["weight"]
    assert torch.equal(compressed_tensors.decode(got, bits), decompressed)


def test_a_group_without_negative_weights_moves_up_by_one_code() -> None:
    codes = torch.tensor([[-8, -8, -7, 6] * 8] * 32, dtype=torch.int8)
    weight = IntWeight(codes, torch.full((32, 1), 0.5), torch.full((32, 1), -8, dtype=torch.int8), 4, None)
    assert torch.equal(gptq.decode(gptq.encode(weight), 4), value_of(weight, torch.float16))
    full = IntWeight(codes + 1, weight.scale_OG, weight.zero_OG, 4, None)
    with pytest.raises(NumericalError, match=r"32 groups without negative weights .* symmetric: true"):
        gptq.encode(full)


def test_what_gptq_cannot_pack() -> None:
    with pytest.raises(UnsupportedRecipe, match=r"24 x 64 can't be packed, 32 must divide both"):
        gptq.encode(random_weight(24, 64, scheme(4, 32), torch.float16))
    huge = random_weight(32, 32, scheme(4, 32), torch.float32)
    with pytest.raises(NumericalError, match="too large for float16"):
        gptq.encode(IntWeight(huge.codes_OI, huge.scale_OG * 1e6, None, 4, 32))


# ------------------------------------------------------------------------------------------- a checkpoint


def is_linear(module: str) -> bool:
    return ".layers." in module and "norm" not in module and not module.endswith((".mlp.gate", "block_sparse_moe.gate"))


def write(
    source: Path,
    target: Path,
    schemes: Callable[[str], IntScheme | None],
    fmt: Any = compressed_tensors,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Quantize a checkpoint by rounding; ``schemes`` says how each Linear module is stored, None to keep it."""
    stored: dict[str, Tensor] = {}
    used: dict[str, IntScheme] = {}
    kept = ["lm_head"]
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        chosen = schemes(module) if is_linear(module) else None
        if chosen is None:
            stored[key] = tensor
            kept += [module] if is_linear(module) else []
        else:
            used[module] = chosen
            parts = fmt.encode(round_to_nearest(tensor, chosen, dtype))
            stored |= {f"{module}.{name}": part for name, part in parts.items()}
    target.mkdir()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = fmt.quantization_config(used, kept)
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_decoded(quantized: Path, source: Path, target: Path) -> Path:
    """Our own reading of a quantized checkpoint, as a float checkpoint."""
    target.mkdir()
    with open_decoded(quantized) as decoded:
        save_file({name: decoded.read(name) for name in decoded.headers}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@torch.no_grad()
def assert_transformers_agrees(quantized: Path, source: Path, scratch: Path) -> None:
    want = AutoModelForCausalLM.from_pretrained(write_decoded(quantized, source, scratch))(IDS).logits
    model, info = AutoModelForCausalLM.from_pretrained(quantized, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_transformers_loads_every_width(
    name: str, bits: int, group_size: int | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    write(sources[name], tmp_path / "q", lambda module: scheme(bits, group_size))
    assert_transformers_agrees(tmp_path / "q", sources[name], tmp_path / "f")


def test_transformers_loads_mixtral(sources: dict[str, Path], tmp_path: Path) -> None:
    write(sources["mixtral"], tmp_path / "q", lambda module: scheme(4, 32))
    assert_transformers_agrees(tmp_path / "q", sources["mixtral"], tmp_path / "f")


@pytest.mark.parametrize("fallback", [scheme(4, None), None])
def test_transformers_loads_layers_that_deviate(
    fallback: IntScheme | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    write(sources["odd"], tmp_path / "q", lambda module: fallback if "down_proj" in module else scheme(4, 64))
    assert_transformers_agrees(tmp_path / "q", sources["odd"], tmp_path / "f")


def test_the_config_says_what_is_quantized_and_how() -> None:
    names = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("up_proj", "down_proj")]
    schemes = {name: scheme(4, None if name == names[1] else 64) for name in names}
    config = compressed_tensors.quantization_config(schemes, ["lm_head", "model.layers.0.mlp.gate_proj"])
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate_proj"]
    groups = [
        (g["targets"], g["weights"]["strategy"], g["weights"]["group_size"]) for g in config["config_groups"].values()
    ]
    assert groups == [(["Linear"], "group", 64), ([names[1]], "channel", None)]
    assert_within(config, {**QuantizationConfig.model_validate(config).model_dump(mode="json"), "version": "0.20.0"})
    assert [compressed_tensors.declared_bits(config, name) for name in names] == [4] * 4


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


@pytest.mark.parametrize("fmt", [compressed_tensors, gptq])
def test_conv1d_is_refused(fmt: Any) -> None:
    with pytest.raises(UnsupportedRecipe, match=r"h\.0\.attn\.c_attn.* Conv1D.*choose method: bitsandbytes"):
        fmt.quantization_config({"transformer.h.0.attn.c_attn": scheme(4, 64)}, [], ["transformer.h.0.attn.c_attn"])


LAYER = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({name: scheme(4, 64) for name in EXPERTS}, r"experts\.0\.gate_proj.*ignore them.*compressed-tensors"),
        ({name: scheme(4, 64) for name in [*LAYER, "lm_head"]}, r"lm_head are outside of .*'model.layers'"),
        ({n: scheme(4, None if "down" in n else 64) for n in LAYER}, r"down_proj deviate.*indivisible: keep"),
        ({name: scheme(4, 48) for name in LAYER}, r"group_size 48 is read by no kernel"),
        ({name: scheme(4, None, False) for name in LAYER}, r"computes wrongly.*symmetric: true"),
    ],
)
def test_what_gptq_refuses(schemes: dict[str, IntScheme], message: str) -> None:
    with pytest.raises(UnsupportedRecipe, match=message):
        gptq.quantization_config(schemes, [])


# -------------------------------------------------------------------------------------------------- gptqmodel

# A process of its own: gptqmodel changes torch's and the process's settings when it is imported.
GPTQ_SCRIPT = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, report = Path(sys.argv[1]), {}
ids = torch.load(folder / "ids.pt")
for case in sorted(folder.glob("*.decoded")):
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32)(ids).logits
        model, info = AutoModelForCausalLM.from_pretrained(
            case.with_suffix(""), dtype=torch.float32, output_loading_info=True
        )
        difference = (model(ids).logits - want).abs().max() / want.std()
    report[case.stem] = {
        "info": {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys},
        "difference": difference.item(),
        "plain": sorted(name for name, module in model.named_modules() if type(module) is torch.nn.Linear),
    }

from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
for path in sorted(folder.glob("*.safetensors")):
    stored = load_file(path)
    want = stored.pop("decoded")
    _, bits, group_size, sym = path.stem.split("_")
    layer = TorchLinear(int(bits), int(group_size), False, sym == "True", want.shape[1], want.shape[0], False)
    missing = layer.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys, missing
    convert_gptq_v1_to_v2_format_module(layer, bits=int(bits), pack_dtype=torch.int32)
    layer.post_init()
    report[path.stem] = torch.equal(layer.dequantize_weight().t(), want)
(folder / "report.json").write_text(json.dumps(report))
"""
WEIGHTS = [(bits, group, sym) for bits in (2, 3, 4, 8) for group in (32, None) for sym in (True, False)]
CHECKPOINTS: dict[str, tuple[str, Callable[[str], IntScheme | None]]] = {
    "w4": ("llama", lambda module: scheme(4, 32)),
    "w4-asymmetric": ("llama", lambda module: scheme(4, 64, symmetric=False)),
    "w3-asymmetric-row": ("llama", lambda module: scheme(3, None, symmetric=False)),
    "w8": ("llama", lambda module: scheme(8, 32)),
    "kept": ("odd", lambda module: None if module.endswith("down_proj") else scheme(2, 64)),
    "one-kept": ("llama", lambda module: None if module == "model.layers.1.mlp.up_proj" else scheme(2, 32)),
    "attention": ("qwen3_moe", lambda module: None if "experts" in module else scheme(2, 32)),
}


@pytest.fixture(scope="module")
def gptq_report(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gptq")
    torch.save(IDS, folder / "ids.pt")
    for name, (source, schemes) in CHECKPOINTS.items():
        write(sources[source], folder / name, schemes, gptq, torch.float16)
        write_decoded(folder / name, sources[source], folder / f"{name}.decoded")
    for bits, group, sym in WEIGHTS:
        stored = gptq.encode(random_weight(64, 96, scheme(bits, group, sym), torch.float16))
        stored["decoded"] = gptq.decode(stored, bits)
        save_file(stored, folder / f"weight_{bits}_{group or -1}_{sym}.safetensors")
    # Without it gptqmodel compiles its kernels for most widths, 3 to 25 s each.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GPTQ_SCRIPT, str(folder)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.parametrize(("bits", "group", "sym"), WEIGHTS)
def test_gptqmodel_decodes_as_we_do(bits: int, group: int | None, sym: bool, gptq_report: dict[str, Any]) -> None:
    assert gptq_report[f"weight_{bits}_{group or -1}_{sym}"] is True


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_loads_gptq(name: str, gptq_report: dict[str, Any]) -> None:
    got = gptq_report[name]
    assert got["info"] == {}
    # The 4-bit CPU kernel computes in bfloat16.
    assert got["difference"] < (0.12 if name.startswith("w4") else 1e-4)


def test_transformers_leaves_alone_what_gptq_kept(gptq_report: dict[str, Any]) -> None:
    assert gptq_report["w4"]["plain"] == ["lm_head"]
    assert gptq_report["kept"]["plain"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]
    assert gptq_report["one-kept"]["plain"] == ["lm_head", "model.layers.1.mlp.up_proj"]


# ------------------------------------------------------------------------------------------------- open_decoded


@pytest.fixture(params=[compressed_tensors, gptq])
def opened(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path: Path
) -> Iterator[tuple[Decoded, Source]]:
    write(sources["llama"], tmp_path / "q", lambda module: scheme(4, 32), request.param, torch.float16)
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
    with pytest.raises(UnsupportedRecipe, match=r"quant_method 'awq'.*bitsandbytes, compressed-tensors, gptq"):
        open_decoded(config_only(tmp_path, {"quant_method": "awq"}))
    with pytest.raises(UnsupportedRecipe, match="checkpoint_format 'gptq_v2'"):
        open_decoded(config_only(tmp_path, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}))


def test_a_weight_that_is_not_whole_is_named(tmp_path: Path) -> None:
    quantization = compressed_tensors.quantization_config({"a": scheme(4, 32)}, [])
    with pytest.raises(CheckpointError, match="a: quantized, but its weight_scale, weight_shape isn't there"):
        open_decoded(config_only(tmp_path, quantization))


def test_other_kinds_of_compressed_tensors_are_named() -> None:
    config = compressed_tensors.quantization_config({"model.layers.0.up_proj": scheme(4, 32)}, [])
    weights = config["config_groups"]["group_0"]["weights"]
    weights["symmetric"] = False
    with pytest.raises(UnsupportedRecipe, match=r"up_proj: can't decode .*'symmetric': False"):
        compressed_tensors.declared_bits(config, "model.layers.0.up_proj")
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    with pytest.raises(UnsupportedRecipe, match="no config group targets it"):
        compressed_tensors.declared_bits(config, "model.layers.0.up_proj")
    weights["symmetric"] = True
    assert compressed_tensors.declared_bits(config, "model.layers.0.down_proj") == 4
