"""Loads an artifact in mlx-lm as its users will, on any processor, and reports the result.

``answer`` is called in a fresh process of the environment ``mlx``, which has no torch: nothing here imports it.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

from workers.verify.runtimes.reply import in_a_line, out_of_memory, reply


def answer(request: str) -> str:
    """The result of loading a ``RuntimeRequest``'s artifact in mlx-lm, as JSON."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    return reply(request, _load_and_run)


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx
    import mlx_lm
    import numpy as np
    from mlx_lm.utils import load_model
    from safetensors.numpy import load_file, save_file

    artifact, scratch = Path(request["artifact"]), Path(request["scratch"])
    model, config = load_model(artifact)
    # Codes stay as they are; scales, biases and the other tensors are computed with in float32, for exactness.
    model.set_dtype(mx.float32)
    given = load_file(scratch / "tokens.safetensors")
    logits = [np.array(model(mx.array(row[None].astype(np.int32))).astype(mx.float32)) for row in given["tokens"]]
    save_file({"logits": np.concatenate(logits)}, scratch / "logits.safetensors")
    generated, problems = _continued(model, config, given["prompts"], request["new_tokens"])
    return {
        "version": f"{mlx_lm.__version__} (mlx {mx.__version__}, {_processor(mx)})",
        "problems": [*_tokenizer_problems(artifact, config, request["trust_remote_code"]), *problems],
        "generated": generated,
        "host_bytes": _peak_bytes(),
    }


def _continued(model: Any, config: dict[str, Any], prompts: Any, new_tokens: int) -> tuple[list[list[int]], list[str]]:
    """Greedy continuations of prompts (int64 [P, T]), up to the end of the text, or why the library generates none."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    ends = config.get("eos_token_id")
    end_ids = set(ends if isinstance(ends, list) else [ends])
    rows = []
    try:
        for prompt in prompts:
            row: list[int] = []
            for token, _ in generate_step(mx.array(prompt.tolist()), model, max_tokens=new_tokens):
                row.append(int(token))
                if row[-1] in end_ids:
                    break
            rows.append(row)
    except Exception as error:
        if out_of_memory(error):
            raise
        return [], [f"runtime mlx-lm: generates not: {in_a_line(error)}"]
    return rows, []


def _tokenizer_problems(artifact: Path, config: dict[str, Any], trust_remote_code: bool) -> list[str]:
    """Why mlx-lm's ``load`` fails on the tokenizer, if it does."""
    from mlx_lm.utils import load_tokenizer

    try:
        load_tokenizer(artifact, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        return [f"runtime mlx-lm: can't load the tokenizer: {in_a_line(error)}"]
    return []


def _processor(mx: Any) -> str:
    return f"{mx.default_device().type.name} on {platform.machine()}"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
