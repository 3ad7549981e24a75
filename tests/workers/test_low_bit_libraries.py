"""Sources that libraries made (bitsandbytes, gptq, awq): decoded as the libraries themselves decode them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.workers.engines.test_bitsandbytes import write_library
from tests.workers.jobs import ZOO, job, recipe
from tests.workers.test_low_bit import accepted, decoded_job
from workers.errors import UnsupportedModel
from workers.formats.kept import open_source
from workers.run import run_stage
from workers.spec.job import Stage
from workers.spec.workspace import artifact_folder

MODELS = ZOO / "models"
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "nf4-packed-in-bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


def _is_conv1d(name: str, key: str) -> bool:
    return name == "gpt2-tiny" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_bitsandbytes_is_decoded_as_the_library_decodes_it(kind: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write_library(MODELS / name, folder, **SETTINGS[kind])
    source = resolve(ModelEntry(id=str(folder), source="dequantize"), tmp_path)
    assert source.decoded == "bitsandbytes"
    library = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    theirs = library.dequantize().state_dict()
    with (
        open_source(folder, source.pin) as opened,
        open_source(MODELS / name, job(MODELS / name, tmp_path).model) as plain,
    ):
        planned = {tensor.name: tuple(tensor.shape) for tensor in source.tensors}
        assert planned == {key: tuple(header.shape) for key, header in opened.headers.items()}
        assert planned == {key: tuple(plain.headers[key].shape) for key in planned}
        for key in opened.headers:
            ours, own = opened.read(key), theirs[key]
            # The library makes linear layers of Conv1D.
            own = own.T if _is_conv1d(name, key) else own
            assert ours.dtype == torch.bfloat16
            if kind == "int8":  # bitsandbytes multiplies in another order of roundings, and then rounds to bfloat16
                torch.testing.assert_close(ours, own.to(torch.bfloat16), rtol=2**-7, atol=0)
            else:
                assert torch.equal(ours, own.to(torch.bfloat16)), key


@pytest.mark.parametrize(
    "kind", [pytest.param("nf4", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.night)]
)
def test_bitsandbytes_is_quantized_and_verified(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write_library(MODELS / "llama-tiny", folder, **SETTINGS[kind])
    for file in MODELS.glob("llama-tiny/tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    of = decoded_job(folder, tmp_path / "runs", "gptq-w4-g128")
    accepted(of, "gptq-w4-g128")


def test_a_shape_that_no_header_tells_is_refused_by_the_plan(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write_library(MODELS / "llama-tiny", folder, **SETTINGS["nf4"])
    tensors = load_file(folder / "model.safetensors")
    odd = {key.replace("layers.0.mlp.up_proj", "layers.0.mlp.strange"): tensor for key, tensor in tensors.items()}
    save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"mlp.strange: \d+ codes of 4 bits, whose shape isn't in the header"):
        resolve(ModelEntry(id=str(folder), source="dequantize"), tmp_path)


# --------------------------------------------------------------------------------------------- gptq and awq

# A process of its own: gptqmodel changes the settings of torch and of the process.
LIBRARY = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file

from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

for given in sys.argv[1:]:
    folder, out = Path(given), {}
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    size = config["group_size"]
    for module in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        names = ("qweight", "qzeros", "scales", "g_idx")
        stored = {name: tensors[f"{module}.{name}"] for name in names if f"{module}.{name}" in tensors}
        if config["quant_method"] == "awq":
            weight = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, size)
        else:
            inputs, outputs = len(stored["g_idx"]), stored["scales"].shape[1]
            layer = TorchLinear(config["bits"], size, config["desc_act"], config["sym"], inputs, outputs, False)
            assert not layer.load_state_dict(stored, strict=False).unexpected_keys
            if config["checkpoint_format"] == "gptq":
                convert_gptq_v1_to_v2_format_module(layer, bits=config["bits"], pack_dtype=torch.int32)
            layer.post_init()
            weight = layer.dequantize_weight()
        out[module] = weight.t().to(torch.float16).contiguous()
    save_file(out, folder.with_suffix(".theirs"))
"""
KINDS = ("gptq", "gptq-v2", "in order of activation", "awq")
ASYMMETRIC = {"bits": 4, "group_size": 64, "symmetric": False}


def _made(kind: str, place: Path) -> Path:
    fmt = "awq" if kind == "awq" else "gptq-v2" if kind == "gptq-v2" else "gptq"
    scheme = {"bits": 4, "group_size": 64} if kind in ("gptq", "in order of activation") else ASYMMETRIC
    of = job(MODELS / "llama-tiny", place, recipe(name="made", method="rtn", scheme=scheme, format=fmt), samples=2)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    folder = artifact_folder(of.workspace, of.orders[0])
    if kind == "in order of activation":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["desc_act"] = True
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for key in [key for key in tensors if key.endswith(".g_idx")]:
            tensors[key] = tensors[key][torch.randperm(len(tensors[key]), generator=generator)].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by kind; beside each, with the suffix .theirs, its weights as gptqmodel decodes them."""
    place = tmp_path_factory.mktemp("packed")
    made = {kind: _made(kind, place / str(index)) for index, kind in enumerate(KINDS)}
    done = subprocess.run([sys.executable, "-c", LIBRARY, *made.values()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_and_awq_are_decoded_as_the_library_decodes_them(kind: str, packed: dict[str, Path]) -> None:
    folder = packed[kind]
    theirs = load_file(folder.with_suffix(".theirs"))
    source = resolve(ModelEntry(id=str(folder), source="dequantize"), folder.parent)
    with open_source(folder, source.pin) as opened:
        for module, want in theirs.items():
            assert torch.equal(opened.read(f"{module}.weight"), want.to(torch.bfloat16)), module
    assert len(theirs) > 10


def test_columns_in_order_of_activation_are_quantized_anew(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = packed["in order of activation"]
    same = recipe(name="again", method="rtn", scheme={"bits": 4, "group_size": 64}, format="gptq")
    of = decoded_job(folder, tmp_path / "again", same)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    assert not any("bit for bit" in line for line in made.fallbacks)
