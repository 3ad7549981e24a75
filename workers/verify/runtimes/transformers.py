"""Load an artifact as its users will, in a process of its own, and say what came out.

``python -m workers.verify.runtimes.transformers REQUEST`` reads a JSON request and writes a JSON answer and the
logits beside it. Nothing of quantmill's engine is imported here: what is tested is the library that users have.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from workers.memory import peak_host_bytes

PR_SET_PDEATHSIG = 1
# How a library says that it isn't the artifact's fault.
NOT_HERE = re.compile(r"(?i)no gpu|(requires?|needs?) (a |an )?(\w+ )?(gpu|cuda|accelerator|xpu)|cuda is not available")
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


# ------------------------------------------------------------------------------------------ the fresh process


def _die_with_parent() -> None:
    """A worker that is killed takes its child with it (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _main(request_path: Path) -> None:
    _die_with_parent()
    request = json.loads(request_path.read_text())
    try:
        answer = _answer(request)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "out of memory" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        lines = str(error).strip().splitlines() or [""]
        missing = isinstance(error, ImportError) or bool(NOT_HERE.search(str(error)))
        answer = {"error": f"{type(error).__name__}: {lines[0]}", "not_here": missing}
    (Path(request["scratch"]) / "answer.json").write_text(json.dumps(answer))


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


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
