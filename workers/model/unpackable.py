"""Finds linear layers whose weight transformers reads while loading a checkpoint, though nothing needs initializing.

A packed checkpoint's modules have no ``weight``: if the class's ``_init_weights`` reads it, loading fails with an
AttributeError (transformers 5.23: Mamba's out_proj, every Linear of Falcon). Running ``_init_weights`` finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from workers.model.loading import StreamedModel


def unpackable_modules(streamed: StreamedModel) -> frozenset[str]:
    """Names, in the model, of the linear modules of its layers that can't be loaded without a ``weight``.

    The layers must be on the meta device, since the check initializes them. The result is cached on ``streamed``.
    """
    if streamed.unpackable is None:
        with torch.inference_mode():
            streamed.unpackable = frozenset(_unpackable(streamed))
    return streamed.unpackable


def _unpackable(streamed: StreamedModel) -> list[str]:
    known: dict[str, list[str]] = {}
    unpackable: list[str] = []
    for index, layer in enumerate(streamed.layers):
        kind = " ".join(f"{name}:{type(module).__name__}" for name, module in layer.named_modules())
        linears = (module for module in layer.modules() if isinstance(module, nn.Linear))
        assert all(module.weight.is_meta for module in linears), "a loaded layer would be overwritten"
        if kind not in known:
            known[kind] = _weights_needed(layer, _owner(streamed))
        unpackable += [f"{streamed.layers_name}.{index}.{name}" if name else "" for name in known[kind]]
    return unpackable


def _owner(streamed: StreamedModel) -> Any:
    """The innermost model around the layers, which initializes them."""
    parts = streamed.layers_name.split(".")
    inside = [streamed.model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in inside if isinstance(module, PreTrainedModel)][-1]


def _weights_needed(layer: nn.Module, owner: Any) -> list[str]:
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    names = {id(module): name for name, module in linears.items()}
    readers = {}
    for module in layer.modules():
        with _reads() as read:
            owner._init_weights(module)
        readers[id(module)] = [names[key] for key in read if key in names]
    needed: list[str] = []
    with _without_weights(linears):
        for module in layer.modules():
            try:
                owner._init_weights(module)
            except AttributeError:
                needed += readers[id(module)]
    return list(dict.fromkeys(needed))


@contextmanager
def _reads() -> Iterator[dict[int, None]]:
    """Ids of the linear modules whose weight is read while the context lasts."""
    read: dict[int, None] = {}

    def recording_getattr(module: nn.Linear, name: str) -> Any:
        if name == "weight":
            read[id(module)] = None
        return nn.Module.__getattr__(module, name)

    # Linear inherits __getattr__, which looks up parameters, from Module.
    nn.Linear.__getattr__ = recording_getattr  # type: ignore[method-assign,assignment]
    try:
        yield read
    finally:
        del nn.Linear.__getattr__


@contextmanager
def _without_weights(linears: dict[str, nn.Linear]) -> Iterator[None]:
    weights = {name: module._parameters.pop("weight") for name, module in linears.items()}
    try:
        yield
    finally:
        for name, module in linears.items():
            module._parameters["weight"] = weights[name]
