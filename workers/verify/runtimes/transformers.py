"""Loads an artifact in transformers as its users will, and reports the result.

``answer`` is called in a fresh process. It uses none of quantmill's engine: the library that users have is tested.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from workers.machine import fp8_kernels
from workers.machine.memory import peak_host_bytes
from workers.model.generation import failing_settings, greedy
from workers.spec.families import forward_of
from workers.spec.patterns import is_speculative
from workers.verify.runtimes.place import Place, placed
from workers.verify.runtimes.reply import in_a_line, out_of_memory, reply

# Disables downloads, and torch.compile, which takes longer for gptqmodel's kernels than the whole check.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
# The logits of one held-out sequence [T, V], for artifacts that quantmill doesn't decode.
HELD_OUT = "held-out-{:06d}.safetensors"
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def answer(request: str) -> str:
    """The result of loading a ``RuntimeRequest``'s artifact in transformers, as JSON."""
    be_quiet()
    return reply(request, _load_and_run)


def be_quiet() -> None:
    """Apply ``QUIET`` to later imports, and to modules that a warm parent has already imported."""
    os.environ.update(QUIET)
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_OFFLINE"] = True
    if torch := sys.modules.get("torch"):
        torch.compiler.set_stance("force_eager")


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    place = placed(request.get("device_bytes", 0))
    if place.rooms:
        # What a library can't do over several cards isn't the artifact's fault: it's judged on the CPU.
        try:
            found = _run(request, place)
        except Exception:
            traceback.print_exc()
        else:
            if not found["problems"]:
                return found
        place = Place("cpu")
    return _run(request, place)


def _run(request: dict[str, Any], place: Place) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    artifact, scratch, device = Path(request["artifact"]), Path(request["scratch"]), place.device
    decoding, kernels = _decoding(artifact, device) if request.get("decodes_on_loading") else ({}, "")
    model, loading = getattr(transformers, request["loader"]).from_pretrained(
        artifact,
        dtype=_dtype(request["arithmetic"], device),
        output_loading_info=True,
        trust_remote_code=request["trust_remote_code"],
        # Taken instead of the one in the artifact, which is judged by itself.
        generation_config=transformers.GenerationConfig(),
        **place.arguments,
        **decoding,
    )
    if place.rooms:
        _decompress(model)
    model = forward_of(model)
    if device == "cpu" and request["arithmetic"] == "decoded":
        _widen(model)
    inputs = {name: tensor.to(device) for name, tensor in load_file(scratch / "tokens.safetensors").items()}
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float().cpu() for row in inputs["tokens"]])
        save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
        for index, row in enumerate(inputs.get("held_out", ())):
            # In the dtype that was computed in: half the bytes of float32.
            held_out = model(row[None], use_cache=False).logits[0].cpu()
            save_file({"logits": held_out.contiguous()}, scratch / HELD_OUT.format(index))
        generated, problems = _continued(model, artifact, inputs["prompts"], request["new_tokens"])
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", sys.maxsize)
    wrong = _loading_problems(loading, request["unused"], layers)
    return {
        "version": transformers.__version__,
        "problems": [*wrong, *_settings_problems(artifact), *problems],
        "generated": generated,
        "host_bytes": peak_host_bytes(),
        "kernels": kernels,
        **({"processor": _processor(model)} if device == "cuda" else {}),
    }


def _processor(model: Any) -> str:
    """The card that a model is on, or how many."""
    import torch

    cards = {parameter.device for parameter in model.parameters()}
    return torch.cuda.get_device_name() if len(cards) == 1 else f"{len(cards)} x {torch.cuda.get_device_name()}"


def _decompress(model: Any) -> None:
    """Decode a model over several cards before its first forward, in which compressed-tensors (0.20) does it otherwise:
    it takes away the hooks there that transformers has moved activations by, and fails in the one that is at work."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def _continued(model: Any, artifact: Path, prompts: Any, new_tokens: int) -> tuple[list[list[int]], list[str]]:
    """Greedy continuations of prompts (int64 [P, T]), or why the library generates none."""
    import torch

    settings = greedy(artifact, model.config, new_tokens)
    # What the given settings leave open is taken from the model's own.
    model.generation_config = settings
    try:
        rows = [
            model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), generation_config=settings)[0]
            for prompt in prompts
        ]
    except Exception as error:
        if out_of_memory(error):
            raise
        return [], [f"runtime transformers: generates not: {in_a_line(error)}"]
    return [row[prompts.shape[1] :].tolist() for row in rows], []


def _decoding(artifact: Path, device: str) -> tuple[dict[str, Any], str]:
    """What has an artifact decoded on loading where a card is, but its format's kernels don't run; and why they don't.

    transformers does it by itself on a machine without a card, and on an old one; else it asks for a package.
    """
    import torch
    from transformers.quantizers.auto import AutoQuantizationConfig

    if not torch.cuda.is_available():
        return {}, ""
    why = fp8_kernels.lacking(torch.cuda.get_device_capability() if device == "cuda" else None)
    if not why:
        return {}, ""
    declared = json.loads((artifact / "config.json").read_text())["quantization_config"]
    decoded = AutoQuantizationConfig.from_dict({**declared, "dequantize": True})
    return {"quantization_config": decoded}, f"{why}: its weights were decoded"


def _settings_problems(artifact: Path) -> list[str]:
    failing = failing_settings(artifact)
    if failing is None:
        return []
    file, reason = failing
    return [f"runtime transformers: {file}: from_pretrained fails on its settings of generation ({reason}); mend them"]


def _widen(model: Any) -> None:
    """Convert half precision to float32: tensors that the library decodes from fp8 ignore the requested dtype."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()


def _dtype(arithmetic: str, device: str) -> Any:
    """The dtype to load in: float32 on a CPU for exactness, except for formats that compute in their own dtype."""
    import torch

    return "auto" if device == "cuda" or arithmetic == "own" else torch.float32


def _loading_problems(loading: dict[str, Any], unused: list[str], layers: int) -> list[str]:
    """Missing, unexpected or mismatched keys: such checkpoints load without an error, but wrongly.

    ``unused`` are unexpected keys of the source, which has no other model for them. Nor does transformers build a
    speculative block after the model's so many layers.
    """
    unexpected = {key for key in loading["unexpected_keys"] if not is_speculative(str(key), layers)}
    found = {**loading, "unexpected_keys": unexpected - set(unused)}
    return [
        f"runtime transformers: {kind.replace('_', ' ')} on loading, got {sorted(map(str, found[kind]))[:5]}"
        for kind in KEY_LISTS
        if found.get(kind)
    ]
