"""Load an artifact as its users will, in a process of its own, and say what came out.

``python -m workers.verify.runtime REQUEST`` reads a JSON request and writes a JSON answer and the logits beside it.
Nothing of quantmill's engine is imported here: what is tested is the library that users have.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import OutOfMemory, WorkerDied

PR_SET_PDEATHSIG = 1
NEW_TOKENS = 16
DEADLINE_SECONDS = 1800.0
# Nothing is fetched; and gptqmodel's kernels compile for longer than the check takes.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class RuntimeAnswer:
    """What the library made of the artifact; ``logits`` is None if it couldn't load it."""

    name: str
    version: str
    problems: tuple[str, ...]
    generated: str
    logits: Any


def ask(artifact: Path, tokens: Any, scratch: Path, trust_remote_code: bool) -> RuntimeAnswer:
    """Load ``artifact`` in a fresh process and run ``tokens`` (int64 [N, T]) through it; logits are float32 [N, T, V].

    A crash of the library is a problem of the artifact, not an exception.

    Raises:
        OutOfMemory: the process was killed, or says so: the machine's fault, not the artifact's.
        WorkerDied: no answer within the deadline.
    """
    from safetensors.torch import load_file, save_file

    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    request = {"artifact": str(artifact), "scratch": str(scratch), "trust_remote_code": trust_remote_code}
    (scratch / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "workers.verify.runtime", str(scratch / "request.json")]
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env={**os.environ, **QUIET, "PYTHONPATH": _import_path()},
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkerDied(f"runtime check of {artifact}: no answer within {DEADLINE_SECONDS:.0f} s") from None
    answer = scratch / "answer.json"
    if done.returncode != 0 or not answer.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if done.returncode == -signal.SIGKILL or "OutOfMemory" in lines[-1] or "MemoryError" in lines[-1]:
            raise OutOfMemory(f"runtime check of {artifact}: out of memory ({lines[-1]}); use a larger machine")
        return _failed(f"the process ended with {done.returncode}: {lines[-1]}")
    said = json.loads(answer.read_text())
    logits = load_file(scratch / "logits.safetensors")["logits"]
    return RuntimeAnswer(said["name"], said["version"], tuple(said["problems"]), said["generated"], logits)


def _failed(what: str) -> RuntimeAnswer:
    return RuntimeAnswer("transformers", "", (f"runtime transformers: can't load the artifact, {what}",), "", None)


def _import_path() -> str:
    """This package's place first: a checkout is imported as itself, also from another folder."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))


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
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scratch, trust = Path(request["scratch"]), request["trust_remote_code"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loading = AutoModelForCausalLM.from_pretrained(
        request["artifact"],
        dtype=_dtype(request["artifact"], device),
        device_map=device,
        output_loading_info=True,
        trust_remote_code=trust,
    )
    if device == "cpu" and _quantization(request["artifact"]).get("quant_method") == "fp8":
        _widen(model)
    tokenizer = AutoTokenizer.from_pretrained(request["artifact"], trust_remote_code=trust)
    tokens = load_file(scratch / "tokens.safetensors")["tokens"].to(device)
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float().cpu() for row in tokens])
        prompt = tokens[:1, :32]
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    answer = {
        "name": "transformers",
        "version": transformers.__version__,
        "problems": _loading_problems(loading),
        "generated": tokenizer.decode(made[0, prompt.shape[1] :]),
    }
    (scratch / "answer.json").write_text(json.dumps(answer))


def _widen(model: Any) -> None:
    """Half precision to float32: what the library decodes from fp8 stays so, whatever dtype is asked for."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()


def _dtype(artifact: str, device: str) -> Any:
    """The checkpoint's own; float32 on a CPU for exactness, but not for what computes in its own whatever is asked for.

    That is bitsandbytes, and compressed-tensors' fp4, which is decoded to bfloat16 while the model runs.
    """
    import torch

    config = _quantization(artifact)
    own = config.get("quant_method") == "bitsandbytes" or "fp4" in str(config.get("format"))
    return "auto" if device == "cuda" or own else torch.float32


def _quantization(artifact: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(artifact) / "config.json").read_text()).get("quantization_config", {})
    return found


def _loading_problems(loading: dict[str, Any]) -> list[str]:
    """Any key that was missing, unexpected or mismatched: such checkpoints load silently wrong."""
    return [
        f"runtime transformers: {kind.replace('_', ' ')} on loading, got {sorted(map(str, loading[kind]))[:5]}"
        for kind in KEY_LISTS
        if loading.get(kind)
    ]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
