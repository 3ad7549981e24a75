"""modelopt's rounding (FP8 with fixed scales of inputs, NVFP4 weights), into the format compressed-tensors.

What the library exports is declared as ``quant_method: modelopt``, which transformers doesn't know, and reads as random
weights without an error. Its codes and scales are those of compressed-tensors under other names, and stored so here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from workers.engines.libraries import speak


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by modelopt, and leave its codes in the request's folder."""
    import modelopt.torch.quantization as quantization
    import torch
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    speak.progress("loading")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["source"], dtype="auto", trust_remote_code=request["trust_remote_code"], variant=request["variant"]
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = speak.tokens_of(request)
    presets = {"fp8": quantization.FP8_DEFAULT_CFG, "nvfp4": quantization.W4A16_NVFP4_CFG}

    def forward(model: Any) -> None:
        with torch.no_grad():
            for one in tokens:
                model(torch.tensor([one], device=model.device))

    speak.layers(model)
    speak.progress("quantizing")
    wanted = only(presets[request["recipe"]["scheme"]["type"]], request["modules"])
    quantization.quantize(model, wanted, forward if tokens else None)
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as saved:
        speak.progress("saving")
        export_hf_checkpoint(model, export_dir=saved)
        _renamed(Path(saved), request["modules"], model.dtype)
        speak.declare(Path(saved), declaration(request), instead=True)
        speak.store(request, Path(saved))
    return []


def only(preset: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """A preset of the library, limited to these modules."""
    chosen = {
        entry["quantizer_name"].removeprefix("*"): entry["cfg"]
        for entry in preset["quant_cfg"]
        if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer") and "cfg" in entry
    }
    entries = [
        {"quantizer_name": f"{module}.{quantizer}", "cfg": settings}
        for module in modules
        for quantizer, settings in chosen.items()
    ]
    return {**preset, "quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries]}


def _renamed(saved: Path, modules: list[str], dtype: Any) -> None:
    """Give the library's tensors their names in the format, whose scales of FP8 have the model's dtype."""
    from safetensors.torch import load_file, save_file

    for path in saved.glob("*.safetensors"):
        made, tensors = load_file(path), {}
        quantized = {name.removesuffix(".weight_scale") for name in made if name.endswith(".weight_scale")}
        assert quantized <= set(modules), "the preset was limited to them"
        for name, tensor in made.items():
            module, _, leaf = name.rpartition(".")
            if module not in quantized:
                tensors[name] = tensor
            elif leaf == "weight_scale_2":  # compressed-tensors divides by it
                tensors[f"{module}.weight_global_scale"] = 1 / tensor.reshape(1)
            elif leaf == "weight" and f"{module}.weight_scale_2" in made:
                tensors[f"{module}.weight_packed"] = tensor
            elif tensor.dim() == 0:
                tensors[name] = tensor.reshape(1).to(dtype)
            else:
                tensors[name] = tensor
        save_file(tensors, path)


def declaration(request: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, in the words of compressed-tensors."""
    alike = {"symmetric": True, "type": "float", "observer": "minmax"}
    fp8 = {**alike, "num_bits": 8, "strategy": "tensor", "group_size": None, "dynamic": False}
    nvfp4 = {**alike, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": False}
    weights, inputs, packing = {
        "fp8": (fp8, fp8, "float-quantized"),
        "nvfp4": ({**nvfp4, "scale_dtype": "torch.float8_e4m3fn"}, None, "nvfp4-pack-quantized"),
    }[request["recipe"]["scheme"]["type"]]
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": packing,
    }
    return {
        "config_groups": {"group_0": group},
        "format": packing,
        "global_compression_ratio": None,
        "ignore": sorted(name for name in request["left"] if not name.endswith("embed_tokens")),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


if __name__ == "__main__":
    speak.main(make)
