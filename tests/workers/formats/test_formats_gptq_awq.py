"""The gptq and awq formats: encode and decode are inverse, gptqmodel decodes as we do, transformers loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.limits import RUN_SECONDS
from tests.workers.artifacts import IDS, make_sources, random_weight, scheme, value_of, write, write_decoded
from workers.errors import NumericalError, UnsupportedRecipe
from workers.formats import awq, gptq
from workers.numerics.codes import IntWeight
from workers.spec.schemes import IntScheme

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda s: (32 * s[0], 32 * s[1]))
VERSIONS = [gptq.V1, gptq.V2]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    shape=SHAPES,
    symmetric=st.booleans(),
    whole_row=st.booleans(),
    version=st.sampled_from(VERSIONS),
)
def test_gptq_is_a_bijection(
    bits: int, shape: tuple[int, int], symmetric: bool, whole_row: bool, version: gptq.Version
) -> None:
    chosen = scheme(bits, None if whole_row else 32, symmetric)
    weight = random_weight(*shape, chosen, torch.float16, seed=sum(shape))
    stored = version.encode(weight, chosen)
    assert torch.equal(version.decode(stored, bits), value_of(weight, torch.float16))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, group=st.sampled_from([16, 32, None]))
def test_awq_is_a_bijection(shape: tuple[int, int], group: int | None) -> None:
    chosen = scheme(4, group, symmetric=False)
    weight = random_weight(*shape, chosen, torch.float16, seed=sum(shape))
    stored = awq.encode(weight, chosen)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "qweight": (torch.int32, (shape[1], shape[0] // 8)),
        "qzeros": (torch.int32, (shape[1] // (group or shape[1]), shape[0] // 8)),
        "scales": (torch.float16, (shape[1] // (group or shape[1]), shape[0])),
    }
    assert torch.equal(awq.decode(stored), value_of(weight, torch.float16))


def test_the_words_of_awq() -> None:
    """Eight outputs 0 to 7, as the bits of one word: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up."""
    codes = torch.arange(8, dtype=torch.int8)[:, None] - 8
    zero = torch.full((8, 1), 7, dtype=torch.int8)
    stored = awq.encode(IntWeight(codes, torch.ones(8, 1), zero, 4, None), scheme(4, None, symmetric=False))
    assert stored["qweight"].tolist() == [[0x75316420]]
    assert stored["qzeros"].tolist() == [[-1]]


def test_the_words_of_gptq() -> None:
    """The first eight inputs of an output lie in one word, the lowest nibble first; zero points minus one, or not."""
    codes = (torch.arange(32, dtype=torch.int8) % 16 - 8).repeat(32, 1)
    weight = IntWeight(codes, torch.ones(32, 1), None, 4, None)
    for version, zeros in ((gptq.V1, 0x77777777), (gptq.V2, 0x88888888 - (1 << 32))):
        stored = version.encode(weight, scheme(4, None))
        assert stored["qweight"][:, 0].tolist() == [0x76543210, 0xFEDCBA98 - (1 << 32)] * 2
        assert stored["qzeros"].tolist() == [[zeros] * 4]


def test_a_group_without_negative_weights_moves_up_by_one_code() -> None:
    codes = torch.tensor([[-8, -8, -7, 6] * 8] * 32, dtype=torch.int8)
    weight = IntWeight(codes, torch.full((32, 1), 0.5), torch.full((32, 1), -8, dtype=torch.int8), 4, None)
    assert torch.equal(gptq.V1.decode(gptq.V1.encode(weight, scheme(4, None)), 4), value_of(weight, torch.float16))
    full = IntWeight(codes + 1, weight.scale_OG, weight.zero_OG, 4, None)
    with pytest.raises(NumericalError, match=r"32 groups without negative weights .* symmetric: true"):
        gptq.V1.encode(full, scheme(4, None))
    stored = gptq.V2.encode(full, scheme(4, None))
    assert torch.equal(gptq.V2.decode(stored, 4), value_of(full, torch.float16))


def test_what_gptq_cannot_pack() -> None:
    with pytest.raises(UnsupportedRecipe, match=r"24 x 64 can't be packed, 32 must divide both"):
        gptq.V1.encode(random_weight(24, 64, scheme(4, 32), torch.float16), scheme(4, 32))
    huge = random_weight(32, 32, scheme(4, 32), torch.float32)
    with pytest.raises(NumericalError, match="too large for float16"):
        gptq.V1.encode(IntWeight(huge.codes_OI, huge.scale_OG * 1e6, None, 4, 32), scheme(4, 32))


def test_what_awq_cannot_pack() -> None:
    chosen = scheme(4, 32, symmetric=False)
    with pytest.raises(UnsupportedRecipe, match=r"12 outputs can't be packed, 8 must divide them"):
        awq.encode(random_weight(12, 64, chosen, torch.float16), chosen)
    weight = random_weight(32, 32, chosen, torch.float32)
    with pytest.raises(NumericalError, match="too large for float16"):
        awq.encode(IntWeight(weight.codes_OI, weight.scale_OG * 1e6, weight.zero_OG, 4, 32), chosen)


EXPERTS = [f"model.layers.0.mlp.experts.{i}.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]
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
        gptq.V1.quantization_config(schemes, [])


def test_what_awq_refuses() -> None:
    with pytest.raises(UnsupportedRecipe, match=r"awq: .*experts\.0\.gate_proj.*ignore them"):
        awq.quantization_config({name: scheme(4, 64, False) for name in EXPERTS}, [])
    with pytest.raises(UnsupportedRecipe, match="awq: group_size 48 is read by no kernel"):
        awq.quantization_config({name: scheme(4, 48, False) for name in LAYER}, [])


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
CHECKPOINTS: dict[str, tuple[Any, str, Callable[[str], IntScheme | None]]] = {
    "w4": (gptq.V1, "llama", lambda module: scheme(4, 32)),
    "w4-asymmetric": (gptq.V1, "llama", lambda module: scheme(4, 64, symmetric=False)),
    "w3-asymmetric-row": (gptq.V1, "llama", lambda module: scheme(3, None, symmetric=False)),
    "w8": (gptq.V1, "llama", lambda module: scheme(8, 32)),
    "kept": (gptq.V1, "odd", lambda module: None if module.endswith("down_proj") else scheme(2, 64)),
    "one-kept": (gptq.V1, "llama", lambda module: None if module == "model.layers.1.mlp.up_proj" else scheme(2, 32)),
    "v2-w3": (gptq.V2, "llama", lambda module: scheme(3, 32, symmetric=False)),
    "awq": (awq, "llama", lambda module: scheme(4, 32, symmetric=False)),
    "awq-kept": (awq, "odd", lambda module: None if module.endswith("down_proj") else scheme(4, 64, symmetric=False)),
    "attention": (gptq.V1, "qwen3_moe", lambda module: None if "experts" in module else scheme(2, 32)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def gptq_report(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gptq")
    torch.save(IDS, folder / "ids.pt")
    for name, (fmt, source, schemes) in CHECKPOINTS.items():
        write(sources[source], folder / name, schemes, fmt, torch.float16)
        write_decoded(folder / name, sources[source], folder / f"{name}.decoded")
    for bits, group, sym in WEIGHTS:
        stored = gptq.V1.encode(
            random_weight(64, 96, scheme(bits, group, sym), torch.float16), scheme(bits, group, sym)
        )
        stored["decoded"] = gptq.V1.decode(stored, bits)
        save_file(stored, folder / f"weight_{bits}_{group or -1}_{sym}.safetensors")
    # Without it gptqmodel compiles its kernels for most widths, 3 to 25 s each.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GPTQ_SCRIPT, str(folder)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group", "sym"), WEIGHTS)
def test_gptqmodel_decodes_as_we_do(bits: int, group: int | None, sym: bool, gptq_report: dict[str, Any]) -> None:
    assert gptq_report[f"weight_{bits}_{group or -1}_{sym}"] is True


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_loads_gptq(name: str, gptq_report: dict[str, Any]) -> None:
    got = gptq_report[name]
    assert got["info"] == {}
    # The 4-bit CPU kernel computes in bfloat16.
    assert got["difference"] < (0.12 if name.startswith(("w4", "awq")) else 1e-4)


def test_transformers_leaves_alone_what_gptq_kept(gptq_report: dict[str, Any]) -> None:
    assert gptq_report["w4"]["plain"] == ["lm_head"]
    assert gptq_report["kept"]["plain"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]
    assert gptq_report["one-kept"]["plain"] == ["lm_head", "model.layers.1.mlp.up_proj"]
