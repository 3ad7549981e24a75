"""Numbers to and from a device: to a card without a wait for it, and from a card in one wait for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; one that is there already is returned.

    A card reads the pinned copy by itself, whose allocator keeps it until that is done.
    """
    if device.type in ("cpu", tensor.device.type) or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """Python's numbers as float32 [N] on the device."""
    return brought(torch.tensor(values, dtype=torch.float32), device)


def truths(flags: Sequence[Tensor]) -> list[bool]:
    """The values of flags (bool, one element each), in one wait."""
    return torch.stack([flag.reshape(()) for flag in flags]).tolist() if flags else []


def magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude of each tensor (floats, not empty), in one wait; NaN where a tensor holds NaN."""
    if not tensors:
        return []
    ends = torch.stack([end for tensor in tensors for end in torch.aminmax(tensor)]).tolist()
    # NaN is no less than anything, and both ends are NaN where one is.
    return [max(-low, high) for low, high in zip(ends[::2], ends[1::2], strict=True)]
