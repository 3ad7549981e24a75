"""llm-compressor's GPTQ, and its rounding to nearest (NVFP4, FP8 and integers), into the format compressed-tensors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from workers.engines.libraries import speak


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by llm-compressor, and leave its codes in the request's folder."""
    import torch
    import transformers
    from llmcompressor import oneshot
    from loguru import logger

    logger.add(lambda line: speak.progress(line.record["message"]), filter=_tells_a_module, level="INFO")

    speak.progress("loading")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["source"], dtype="auto", trust_remote_code=request["trust_remote_code"], variant=request["variant"]
    )
    tokens = speak.tokens_of(request)
    data: dict[str, Any] = {}
    if tokens:
        rows: Any = [
            {"input_ids": torch.tensor([one]), "attention_mask": torch.ones(1, len(one)).long()} for one in tokens
        ]
        loader: Any = torch.utils.data.DataLoader(rows, batch_size=None)
        data = {"dataset": loader, "num_calibration_samples": len(rows), "max_seq_length": len(tokens[0])}
    speak.progress("quantizing")
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as saved:
        oneshot(model=model, recipe=_modifier(request), **data)
        speak.progress("saving")
        model.save_pretrained(saved, save_compressed=True)
        speak.store(request, Path(saved))
    return []


def _tells_a_module(record: Any) -> bool:
    return str(record["message"]).startswith("Quantizing")


def _modifier(request: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = request["recipe"]
    scheme, options = recipe["scheme"], recipe["options"]
    ignore = [f"re:{name}" for name in speak.exactly(request["left"])]
    chosen: dict[str, Any] = {"ignore": ignore, **arguments(scheme)}
    if "config_groups" in chosen:
        chosen["config_groups"] = {"group_0": QuantizationScheme(**chosen["config_groups"]["group_0"])}
    if recipe["method"] != "gptq":
        return QuantizationModifier(**chosen)
    order = "static" if options["activation_order"] else None
    return GPTQModifier(**chosen, dampening_frac=options["damping"], actorder=order)


def arguments(scheme: dict[str, Any]) -> dict[str, Any]:
    """A scheme as the library's modifiers take it."""
    if scheme["type"] == "nvfp4":
        return {"targets": "Linear", "scheme": "NVFP4A16" if scheme["activations"] == "none" else "NVFP4"}
    if scheme["type"] == "fp8":
        return {"targets": "Linear", "scheme": "FP8_DYNAMIC"}
    strategy = {"strategy": "group", "group_size": scheme["group_size"]} if scheme["group_size"] else {}
    weights = {"num_bits": scheme["bits"], "type": "int", "symmetric": True, **(strategy or {"strategy": "channel"})}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


if __name__ == "__main__":
    speak.main(make)
