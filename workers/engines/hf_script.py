"""The engine of ``method: transformers``: a quantizer of the installed transformers makes a whole artifact.

Run as ``python -m workers.engines.hf_script`` by ``engines.whole``: a ``WholeRequest`` as a line of JSON on standard
input, a ``WholeAnswer`` on standard output, weights and config.json in the request's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workers.checkpoint.source import Source
from workers.engines import hf_registry
from workers.engines.whole import headers_of
from workers.errors import UnsupportedRecipe, UserError
from workers.machine.files import write_text
from workers.methods.scaling import some
from workers.model.loading import read_config
from workers.spec.auto_classes import loader_of
from workers.spec.engines import WholeAnswer, WholeRequest
from workers.spec.layers import EXPERT, Layout, layer_of, quantizable
from workers.spec.recipes import TransformersRecipe
from workers.spec.tensors import FLOATS, TensorHeader
from workers.spec.workspace import MAX_SHARD_BYTES

KEPT = ("*.safetensors", "*.safetensors.index.json")


def make(request: WholeRequest) -> WholeAnswer:
    """Load the source quantized, save it, and say which modules are stored quantized.

    Raises:
        UnsupportedRecipe: the quantizer refuses the recipe or the model, or leaves it as it was.
        PreflightError: this machine lacks what the quantizer needs.
    """
    import transformers

    recipe, source, out = request.recipe, Path(request.source), Path(request.out)
    assert isinstance(recipe, TransformersRecipe), "the engine of one method"
    hf_registry.validate(recipe)
    config = read_config(source)
    loader = getattr(transformers, loader_of(config))
    skipped = _skipped(loader, source, recipe, trust_remote_code=request.trust_remote_code)
    with hf_registry.said(f"{recipe.scheme.config} on {source.name}"):
        model, loading = loader.from_pretrained(
            source,
            quantization_config=hf_registry.config_of(recipe.scheme, skipped),
            dtype="auto",
            device_map=hf_registry.device(),
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
            variant=request.variant,
            generation_config=transformers.GenerationConfig(),
        )
        if missing := sorted(loading["missing_keys"]):
            raise UnsupportedRecipe(f"transformers finds no {missing[:3]} in the checkpoint; choose another recipe")
        model.generation_config = transformers.GenerationConfig()
        model.save_pretrained(out, max_shard_size=MAX_SHARD_BYTES)
    _only_weights(out)
    return _answer(recipe, source, out, config, request.variant)


def _skipped(loader: Any, source: Path, recipe: TransformersRecipe, *, trust_remote_code: bool) -> list[str]:
    """Linear modules that stay as they are; empty if those are the ones that transformers leaves by itself."""
    import torch
    import transformers
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=trust_remote_code)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = {name for name in linear if recipe.ignores(name) or layer_of(f"{name}.weight") is None}
    by_itself = set(get_keys_to_not_convert(model))
    return sorted(left | by_itself) if left - by_itself else []


def _only_weights(out: Path) -> None:
    """Remove what is copied from the source."""
    kept = {path for pattern in KEPT for path in out.glob(pattern)} | {out / "config.json"}
    for path in out.iterdir():
        if path not in kept and path.is_file():
            path.unlink()


def _answer(
    recipe: TransformersRecipe, source: Path, out: Path, config: Mapping[str, Any], variant: str | None
) -> WholeAnswer:
    """Put the source's config.json back with the quantizer's block, and read the stored headers."""
    block = json.loads((out / "config.json").read_text()).get("quantization_config")
    if not block:
        raise UnsupportedRecipe(f"{recipe.scheme.config} left no quantization_config; choose another recipe")
    write_text(out / "config.json", json.dumps({**config, "quantization_config": block}, indent=2) + "\n")
    with Source(source, variant=variant) as plain, Source(out) as stored:
        wanted = [t for t in headers_of(plain) if quantizable(t, recipe)]
        kept = {t.name: t for t in headers_of(stored)}
        modules = [t.name.removesuffix(".weight") for t in wanted if _is_coded(kept.get(t.name), t)]
        left = [t.name.removesuffix(".weight") for t in wanted if not _is_coded(kept.get(t.name), t)]
        fused = [t.name for t in headers_of(plain) if EXPERT.search(t.name)]
    if not modules:
        raise UnsupportedRecipe(
            f"nothing was quantized: transformers left {some(left or [t.name for t in wanted])} as they were; choose "
            "another recipe for this model"
        )
    notes = [f"left in half precision by {recipe.scheme.config}: {some(left)}"] if left else []
    if fused:
        notes.append(f"experts stay in half precision, which {recipe.scheme.config} doesn't convert: {some(fused)}")
    layout = Layout(schemes=(recipe.scheme,), modules=dict.fromkeys(modules, 0))
    return WholeAnswer(layout=layout, fallbacks=tuple(notes))


def _is_coded(stored: TensorHeader | None, source: TensorHeader) -> bool:
    """Whether a weight of the source is stored as something else: under other names, or not as floats of its shape."""
    return stored is None or stored.dtype not in FLOATS or stored.shape != source.shape


def answers(lines: Iterable[str]) -> WholeAnswer:
    """The answer to the first line, a ``WholeRequest`` as JSON; a recipe or machine at fault is an ``error``."""
    try:
        return make(WholeRequest.model_validate_json(next(iter(lines))))
    except UserError as error:
        return WholeAnswer(error=str(error))


if __name__ == "__main__":
    print(answers(sys.stdin).model_dump_json(), flush=True)
