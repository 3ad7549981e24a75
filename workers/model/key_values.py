"""Finds the attention modules that cache keys and values, and shows what they would cache while they run.

As compressed-tensors 0.20 does it: an attention module hands keys and values, after their rotation, to the ``update``
of the cache that it is given, and goes on with what is returned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from workers.model.loading import StreamedModel
from workers.spec.formats import CACHE_SCALES

# Names of the modules whose cache runtimes quantize, and of the projections that make keys and values themselves. An
# attention with ``kv_b_proj`` (multi-head latent attention) is left out: runtimes cache its latents.
ATTENTION = re.compile(r".*(self_attn|attention)$")
PROJECTIONS = (("k_proj", "v_proj"), ("qkv_proj",))
KEYS, VALUES = CACHE_SCALES
ARGUMENT = "past_key_values"


def attentions_of(streamed: StreamedModel, layer: int) -> dict[str, str]:
    """The names of a layer's attention modules that cache keys and values: in the model, and in the checkpoint."""
    found = {}
    for weight in streamed.weights:
        name, _, projection = weight.input.module.rpartition(".")
        if weight.layer != layer or not ATTENTION.match(name) or name in found:
            continue
        module = streamed.model.get_submodule(name)
        whole = any(projection in names and all(hasattr(module, n) for n in names) for names in PROJECTIONS)
        if whole and ARGUMENT in signature(module.forward).parameters:
            found[name] = weight.module.rpartition(".")[0]
    return found


class _Cache:
    """A cache that keeps nothing, and hands on what ``change`` makes of keys and values."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._change = change

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention goes on with; keys and values float [B, heads, T, width]."""
        return self._change(keys, values)


@contextmanager
def changing(module: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Call ``change`` with a module's keys and values whenever it runs, and go on with the result."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return args, {**kwargs, ARGUMENT: _Cache(change)}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
