"""auto-gptq's GPTQ, into the format gptq (first version)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from workers.engines.libraries import older, speak


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by auto-gptq, and leave its codes in the request's folder."""
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    if not torch.cuda.is_available():
        # from_pretrained, which isn't called, refuses to load without CUDA, and quantize moves each layer to the
        # first card and waits for it. Nothing else of the solver needs a card: here, the CPU is that card.
        _base.CUDA_0 = _base.CPU
        torch.cuda.synchronize = lambda device=None: None
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as scratch:
        speak.progress("loading")
        plain = older.load(request, Path(scratch))
        kind = older.model_class(GPTQ_CAUSAL_LM_MODEL_MAP, plain, "auto-gptq")
        _only(_base, plain, request["modules"])
        model = kind(plain, quantized=False, quantize_config=BaseQuantizeConfig(**speak.gptq_settings(request)))
        speak.layers(plain)
        speak.progress("quantizing")
        model.quantize(speak.gptq_rows(request), batch_size=1)
        speak.progress("saving")
        saved = Path(scratch) / "saved"
        model.save_quantized(str(saved))
        speak.declare(saved, speak.gptq_exceptions(request))
        tied = plain._tied_weights_keys or () if plain.config.tie_word_embeddings else ()
        _as_read(saved, speak.names(Path(request["source"])), set(tied))
        speak.store(request, saved)
    return []


def _as_read(saved: Path, plain: set[str], tied: set[str]) -> None:
    """Store scales in float16, as the format has them, without what is stored twice or added as zeros.

    The source (``plain``) has neither the weight of a ``tied`` head nor biases where the model has none.
    """
    import torch
    from safetensors.torch import load_file, save_file

    for path in saved.glob("*.safetensors"):
        tensors = load_file(path)
        added = {name for name in tensors if name.endswith(".bias") and name not in plain}
        kept = {
            name: tensor.to(torch.float16) if name.endswith(".scales") else tensor
            for name, tensor in tensors.items()
            if (name in plain or name not in tied) and (name not in added or tensor.any())
        }
        save_file(kept, path)


def _only(base: Any, model: Any, modules: list[str]) -> None:
    """Have the library find no layers of a block but these, by their names in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    find, chosen = base.find_layers, set(modules)

    def found(*arguments: Any, **more: Any) -> dict[str, Any]:
        return {name: layer for name, layer in find(*arguments, **more).items() if names.get(id(layer)) in chosen}

    base.find_layers = found


if __name__ == "__main__":
    speak.main(make)
