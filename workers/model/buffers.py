"""Initializes the buffers that no checkpoint holds: rotary frequencies, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import UnsupportedModel


def make_buffers(model: Any, device: str) -> None:
    """Initialize the non-persistent buffers (rotary frequencies, masks) by the model's own ``_init_weights``.

    Raises:
        UnsupportedModel: ``_init_weights`` leaves a buffer unset.
    """
    from transformers import PreTrainedModel

    stored, owner = set(model.state_dict()), dict[str, Any]()
    buffers: dict[str, tuple[Any, nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        # As in transformers, the innermost model around a module initializes it.
        owner[prefix] = module if isinstance(module, PreTrainedModel) else owner[prefix.rpartition(".")[0]]
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer.is_meta and name not in stored:
                module._buffers[leaf] = torch.full_like(buffer, _unset(buffer.dtype), device=device)
                buffers[name] = (owner[prefix], module, leaf)
    for initializer, module in {
        id(module): (initializer, module) for initializer, module, _ in buffers.values()
    }.values():
        initializer._init_weights(module)
    # Some buffers are set for all layers at once, when the model itself is initialized.
    for initializer in {
        id(initializer): initializer
        for initializer, module, leaf in buffers.values()
        if _is_unset(module.get_buffer(leaf))
    }.values():
        initializer._init_weights(initializer)
    unset = [name for name, (_, module, leaf) in buffers.items() if _is_unset(module.get_buffer(leaf))]
    if unset:
        raise UnsupportedModel(
            f"model {type(model).__name__}: its own initialization doesn't make {unset[:3]}, which no checkpoint "
            "holds; leave it out of the zoo"
        )


def _unset(dtype: torch.dtype) -> float | int | bool:
    """Marker value of an uninitialized buffer; no initialized buffer holds it throughout."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else int(torch.iinfo(dtype).min)


def _is_unset(buffer: Tensor) -> bool:
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    return buffer.dtype != torch.bool and buffer.numel() > 0 and bool((buffer == _unset(buffer.dtype)).all())
