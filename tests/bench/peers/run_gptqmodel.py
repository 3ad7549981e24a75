"""Quantize with gptqmodel, in its own environment: ``python -m tests.bench.peers.run_gptqmodel REQUEST``."""

from __future__ import annotations

from tests.bench.peers.runner import Answer, Request, rows, serve


def quantize(request: Request, answer: Answer) -> None:
    """``settings``: method (gptq, awq), config (of its quantize config), quantize (arguments of the call)."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    settings = request.settings
    config = {"gptq": GPTQConfig, "awq": AWQConfig}[settings["method"]](**settings["config"])
    arguments = dict(settings.get("quantize", {}))
    if "backend" in arguments:
        arguments["backend"] = BACKEND[arguments["backend"]]
    loading = {"dtype": getattr(torch, settings["dtype"])} if "dtype" in settings else {}
    with answer.timed("load"):
        model = GPTQModel.load(request.model, config, **loading)
    answer.used["dtype"] = str(next(model.model.parameters()).dtype)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows(request)]
    with answer.timed("quantize"):
        model.quantize(samples, **arguments)
    with answer.timed("save"):
        model.save(request.out)


if __name__ == "__main__":
    serve(quantize, "gptqmodel")
