"""Loads an artifact in transformers as its users will, and reports the result.

``answer`` is called in a fresh process. It uses none of quantmill's engine: the library that users have is tested.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from workers.machine.memory import peak_host_bytes
from workers.verify.runtimes.reply import reply

# Disables downloads, and torch.compile, which takes longer for gptqmodel's kernels than the whole check.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def answer(request: str) -> str:
    """The result of loading a ``RuntimeRequest``'s artifact in transformers, as JSON."""
    _be_quiet()
    return reply(request, _load_and_run)


def _be_quiet() -> None:
    """Apply ``QUIET`` to later imports, and to modules that a warm parent has already imported."""
    os.environ.update(QUIET)
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_OFFLINE"] = True
    if torch := sys.modules.get("torch"):
        torch.compiler.set_stance("force_eager")


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    scratch, device = Path(request["scratch"]), "cuda" if torch.cuda.is_available() else "cpu"
    model, loading = getattr(transformers, request["loader"]).from_pretrained(
        request["artifact"],
        dtype=_dtype(request["arithmetic"], device),
        device_map=device,
        output_loading_info=True,
        trust_remote_code=request["trust_remote_code"],
    )
    if device == "cpu" and request["arithmetic"] == "decoded":
        _widen(model)
    inputs = {name: tensor.to(device) for name, tensor in load_file(scratch / "tokens.safetensors").items()}
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float().cpu() for row in inputs["tokens"]])
        generated = [_continued(model, prompt[None], request["new_tokens"]) for prompt in inputs["prompts"]]
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": transformers.__version__,
        "problems": _loading_problems(loading),
        "generated": generated,
        "host_bytes": peak_host_bytes(),
    }


def _continued(model: Any, prompt: Any, new_tokens: int) -> list[int]:
    """Greedy continuation, the tokens that a user would get."""
    import torch

    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens


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


def _loading_problems(loading: dict[str, Any]) -> list[str]:
    """Missing, unexpected or mismatched keys: such checkpoints load without an error, but wrongly."""
    return [
        f"runtime transformers: {kind.replace('_', ' ')} on loading, got {sorted(map(str, loading[kind]))[:5]}"
        for kind in KEY_LISTS
        if loading.get(kind)
    ]
