"""Quantize with llm-compressor, in its own environment: ``python -m tests.bench.peers.run_llmcompressor REQUEST``."""

from __future__ import annotations

from typing import Any

from tests.bench.peers.runner import Answer, Request, rows, serve


def quantize(request: Request, answer: Answer) -> None:
    """``settings``: modifiers ([class, arguments] each, in order), oneshot (arguments of the call)."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():
        # 0.14.1a20261020 pins memory for a GPU that isn't there.
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    settings = request.settings
    with answer.timed("load"):
        model = AutoModelForCausalLM.from_pretrained(request.model, dtype=settings.get("dtype", "auto"))
        tokenizer = AutoTokenizer.from_pretrained(request.model)
    answer.used["dtype"] = str(model.dtype)
    tokens = rows(request)
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    with answer.timed("quantize"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_list(samples),
            recipe=[_modifier(name, arguments) for name, arguments in settings["modifiers"]],
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            shuffle_calibration_samples=False,
            **settings.get("oneshot", {}),
        )
    with answer.timed("save"):
        model.save_pretrained(request.out, save_compressed=True)
        tokenizer.save_pretrained(request.out)


def _modifier(name: str, arguments: dict[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    classes = {kind.__name__: kind for kind in (AWQModifier, GPTQModifier, QuantizationModifier)}
    return classes[name](**arguments)


if __name__ == "__main__":
    serve(quantize, "llmcompressor", "compressed-tensors")
