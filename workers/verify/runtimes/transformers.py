"""transformers: load an artifact as its users will, and say what came out.

``answer`` is asked in a fresh process. Nothing of quantmill's engine takes part: what is tested is the library that
users have.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from workers.machine.memory import peak_host_bytes
from workers.verify.runtimes.reply import reply

# Nothing is fetched; and gptqmodel's kernels compile for longer than the check takes.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def answer(request: str) -> str:
    """What transformers makes of the artifact that a ``RuntimeRequest`` names, as JSON."""
    _be_quiet()
    return reply(request, _answer)


def _be_quiet() -> None:
    """For what is imported from here on, and for what a warm parent has imported before."""
    os.environ.update(QUIET)
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_OFFLINE"] = True
    if torch := sys.modules.get("torch"):
        torch.compiler.set_stance("force_eager")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
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
    given = {name: tensor.to(device) for name, tensor in load_file(scratch / "tokens.safetensors").items()}
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float().cpu() for row in given["tokens"]])
        generated = [_continued(model, prompt[None], request["new_tokens"]) for prompt in given["prompts"]]
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": transformers.__version__,
        "problems": _loading_problems(loading),
        "generated": generated,
        "host_bytes": peak_host_bytes(),
    }


def _continued(model: Any, prompt: Any, new_tokens: int) -> list[int]:
    """The tokens that a user would get, one after the other the most likely."""
    import torch

    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


def _widen(model: Any) -> None:
    """Half precision to float32: what the library decodes from fp8 stays so, whatever dtype is asked for."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()


def _dtype(arithmetic: str, device: str) -> Any:
    """The checkpoint's own; float32 on a CPU for exactness, but not for a format that computes in its own dtype."""
    import torch

    return "auto" if device == "cuda" or arithmetic == "own" else torch.float32


def _loading_problems(loading: dict[str, Any]) -> list[str]:
    """Any key that was missing, unexpected or mismatched: such checkpoints load silently wrong."""
    return [
        f"runtime transformers: {kind.replace('_', ' ')} on loading, got {sorted(map(str, loading[kind]))[:5]}"
        for kind in KEY_LISTS
        if loading.get(kind)
    ]
