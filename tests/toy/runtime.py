"""The toy runtime: a library that reads the toy format, which is transformers given the decoded weights."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from workers.spec.runtimes import Runtime
from workers.verify.runtimes.reply import reply

ROW = Runtime(
    name="toyrun",
    distribution="transformers",
    rules={"toy": lambda scheme, kinds: "are experts" if kinds.experts else None},
    snippet=lambda repo, loader, chats: f'import toyrun\n\nmodel = toyrun.load("{repo}")\n',
    entry="tests.toy.runtime:answer",
)


def answer(request: str) -> str:
    """What the toy library makes of an artifact."""
    return reply(request, _look)


def _look(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    artifact, scratch = Path(request["artifact"]), Path(request["scratch"])
    declared = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert declared == {"quant_method": "toy"}
    stored = load_file(artifact / "model.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if ".toy_" not in name}
    for name in [name for name in stored if name.endswith(".toy_codes")]:
        module = name.removesuffix(".toy_codes")
        scale = stored[f"{module}.toy_scale"]
        weights[f"{module}.weight"] = stored[name].to(scale.dtype) * scale
    config = AutoConfig.from_pretrained(artifact)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    loaded = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    given = load_file(scratch / "tokens.safetensors")
    with torch.inference_mode():
        logits = torch.cat([model(row[None]).logits for row in given["tokens"]])
        whole = model.generate(given["prompts"], max_new_tokens=request["new_tokens"], do_sample=False)
        made = whole[:, given["prompts"].shape[1] :].tolist()
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": "0.1",
        "problems": [f"runtime toyrun: unexpected keys {loaded.unexpected_keys}"] if loaded.unexpected_keys else [],
        "generated": made,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
