"""Load an artifact as its users will, in a process of its own, and say what came out.

``answer`` is asked in that process: it reads a JSON request, and writes the logits beside the tokens that it was given.
Nothing of quantmill's engine takes part: what is tested is the library that users have.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import OutOfMemory, WorkerDied
from workers.machine import child
from workers.memory import peak_host_bytes

NAME = "transformers"
# Tokens of each prompt, and tokens that are generated after it.
PROMPT_TOKENS, NEW_TOKENS = 32, 24
DEADLINE_SECONDS = 1800.0
# Nothing is fetched; and gptqmodel's kernels compile for longer than the check takes.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
# How a library says that it isn't the artifact's fault.
NOT_HERE = re.compile(r"(?i)no gpu|(requires?|needs?) (a |an )?(\w+ )?(gpu|cuda|accelerator|xpu)|cuda is not available")
KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class RuntimeAnswer:
    """What the library made of the artifact; ``logits`` is None if it couldn't load it.

    ``generated`` are the tokens after each prompt; ``infeasible`` says why it couldn't be tried on this machine.
    """

    name: str
    version: str
    problems: tuple[str, ...] = ()
    infeasible: tuple[str, ...] = ()
    generated: tuple[tuple[int, ...], ...] = ()
    logits: Any = None
    host_bytes: int = 0


def ask(artifact: Path, tokens: Any, prompts: Any, scratch: Path, trust_remote_code: bool) -> RuntimeAnswer:
    """Load ``artifact`` in a fresh process and run ``tokens`` (int64 [N, T]) through it; logits are float32 [N, T, V].

    It goes on greedily after each of ``prompts`` (int64 [P, T]). A crash of the library is a problem of the artifact,
    not an exception.

    Raises:
        OutOfMemory: the process was killed, or says so: the machine's fault, not the artifact's.
        WorkerDied: no answer within the deadline.
    """
    from safetensors.torch import load_file, save_file

    save_file({"tokens": tokens, "prompts": prompts}, scratch / "tokens.safetensors")
    request = {"artifact": str(artifact), "scratch": str(scratch), "trust_remote_code": trust_remote_code}
    try:
        done = child.run(f"{__name__}:answer", json.dumps(request), cwd=scratch, seconds=DEADLINE_SECONDS)
    except TimeoutError:
        raise WorkerDied(f"runtime check of {artifact}: no answer within {DEADLINE_SECONDS:.0f} s") from None
    if done.answer is None:
        if done.out_of_memory:
            raise OutOfMemory(f"runtime check of {artifact}: out of memory ({done.said}); use a larger machine")
        return _failed(f"the process ended with {done.code}: {done.said}")
    said = json.loads(done.answer)
    if "error" in said:
        if said["not_here"]:
            return RuntimeAnswer(NAME, "", infeasible=(f"runtime {NAME}: can't be tried here, {said['error']}",))
        return _failed(said["error"])
    logits = load_file(scratch / "logits.safetensors")["logits"]
    generated = tuple(tuple(row) for row in said["generated"])
    return RuntimeAnswer(NAME, said["version"], tuple(said["problems"]), (), generated, logits, said["host_bytes"])


def _failed(what: str) -> RuntimeAnswer:
    return RuntimeAnswer(NAME, "", (f"runtime {NAME}: can't load the artifact, {what}",))


# ------------------------------------------------------------------------------------------ the fresh process


def answer(request: str) -> str:
    """What came out, as JSON; ``error`` for what the library raised."""
    _be_quiet()
    try:
        return json.dumps(_answer(json.loads(request)))
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "out of memory" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        lines = str(error).strip().splitlines() or [""]
        missing = isinstance(error, ImportError) or bool(NOT_HERE.search(str(error)))
        return json.dumps({"error": f"{type(error).__name__}: {lines[0]}", "not_here": missing})


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
    from transformers import AutoModelForCausalLM

    scratch, device = Path(request["scratch"]), "cuda" if torch.cuda.is_available() else "cpu"
    model, loading = AutoModelForCausalLM.from_pretrained(
        request["artifact"],
        dtype=_dtype(request["artifact"], device),
        device_map=device,
        output_loading_info=True,
        trust_remote_code=request["trust_remote_code"],
    )
    if device == "cpu" and _quantization(request["artifact"]).get("quant_method") == "fp8":
        _widen(model)
    given = {name: tensor.to(device) for name, tensor in load_file(scratch / "tokens.safetensors").items()}
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float().cpu() for row in given["tokens"]])
        generated = [_continued(model, prompt[None]) for prompt in given["prompts"]]
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": transformers.__version__,
        "problems": _loading_problems(loading),
        "generated": generated,
        "host_bytes": peak_host_bytes(),
    }


def _continued(model: Any, prompt: Any) -> list[int]:
    """The tokens that a user would get, one after the other the most likely."""
    import torch

    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


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
