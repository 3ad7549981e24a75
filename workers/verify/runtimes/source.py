"""Loads a source checkpoint in transformers as its users do, and reports what it computes.

``answer`` is called in a fresh process. It uses none of quantmill's reading: the two are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from workers.machine.memory import peak_host_bytes
from workers.model.card_room import has_card
from workers.model.cut import first_layers
from workers.spec.base import Frozen
from workers.spec.families import DEFAULT_LOADER, forward_of
from workers.verify.runtimes.reply import reply
from workers.verify.runtimes.transformers import be_quiet

# A folder that no checkpoint has, in which transformers looks for adapters if peft is installed: the reference is the
# model without the adapter that may lie beside it.
NO_ADAPTER = {"subfolder": "quantmill-reads-no-adapter"}


class SourceRequest(Frozen):
    """Request for the logits of a source at the last ``positions`` of each sequence.

    The folder ``scratch`` contains ``tokens.safetensors`` (``tokens`` int64 [N, T]); the logits are written there as
    ``logits.safetensors`` (float32 [N, ``positions``, V]).
    """

    source: str
    scratch: str
    dtype: str = Field(description="Of torch, by its name: the one that the reference was computed in.")
    positions: int = Field(ge=1)
    layers: int | None = Field(None, ge=1, description="Load only the first layers.")
    loader: str = DEFAULT_LOADER
    trust_remote_code: bool = False
    variant: str | None = Field(None, description="Of the weight files' names.")


def answer(request: str) -> str:
    """The result of a ``SourceRequest``, as JSON: ``version``, and the ``missing`` and ``mismatched`` keys."""
    be_quiet()
    return reply(request, _load_and_run)


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    source, scratch, trusted = Path(request["source"]), Path(request["scratch"]), request["trust_remote_code"]
    device = "cuda" if has_card() else "cpu"
    cut = {}
    if request["layers"] is not None:
        whole = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted)
        cut["config"] = first_layers(whole, request["layers"])
    model, loading = getattr(transformers, request["loader"]).from_pretrained(
        source,
        dtype=getattr(torch, request["dtype"]),
        device_map=device,
        output_loading_info=True,
        trust_remote_code=trusted,
        variant=request["variant"],
        generation_config=transformers.GenerationConfig(),
        adapter_kwargs=NO_ADAPTER,
        **cut,
    )
    model = forward_of(model)
    tokens = load_file(scratch / "tokens.safetensors")["tokens"].to(device)
    last = slice(-request["positions"], None)
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits[:, last].float().cpu() for row in tokens])
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": transformers.__version__,
        "missing": sorted(loading["missing_keys"]),
        "mismatched": sorted(map(str, loading["mismatched_keys"])),
        "host_bytes": peak_host_bytes(),
    }
