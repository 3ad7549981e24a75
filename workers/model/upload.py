"""Brings a layer's tensors to the device that computes, once for all recipes of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.machine.card_share import share_of
from workers.numerics.waits import brought

# A layer is brought to a card whole, beside the one at work and the model's stacks of experts, if as many layers of its
# size fit into this share of what this process may have of it; else each tensor is, as often as it is asked for.
COPIES, SHARE = 3, 0.25


@dataclass(frozen=True)
class LayerTensors:
    """A layer's checkpoint tensors by key: as read, on the CPU, and placed on the device that computes.

    On a CPU both are the same. ``loaded`` are those that the model is loaded from.
    """

    as_read: Mapping[str, Tensor]
    placed: Mapping[str, Tensor]
    loaded: Mapping[str, Tensor]
    arrived: torch.Event | None = None

    @property
    def whole(self) -> bool:
        """Whether ``placed`` are all there, rather than brought whenever they are asked for."""
        return not isinstance(self.placed, _OnDemand)

    @property
    def home(self) -> torch.device:
        """Where ``loaded`` are."""
        return next((tensor.device for tensor in self.loaded.values()), torch.device("cpu"))

    def wait(self) -> None:
        """Have the card, not this process, wait until the tensors are there."""
        if self.arrived is not None:
            self.arrived.wait()


class Upload:
    """Places layers on a device; on a card from pinned memory, on a stream of its own, beside what is computed.

    It may be called in a thread; whoever uses the tensors calls their ``wait`` first.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream: torch.Stream | None = None
        self._room = 0.0
        if self._device.type == "cuda":
            self._stream = torch.Stream(self._device)
            total = torch.cuda.get_device_properties(self._device).total_memory
            self._room = SHARE * share_of() * total

    def __call__(self, tensors: Mapping[str, Tensor], pinned: Mapping[str, Tensor] | None = None) -> LayerTensors:
        """A layer on the device; ``pinned`` are the same tensors in pinned memory, if they are there already."""
        if self._stream is None:
            return LayerTensors(tensors, tensors, tensors)
        if not self.takes(tensors):
            return LayerTensors(tensors, _OnDemand(tensors, self._device), tensors)
        computing = torch.accelerator.current_stream(self._device)
        with self._stream:
            placed = {key: brought(tensor, self._device) for key, tensor in (pinned or tensors).items()}
        for tensor in placed.values():
            tensor.record_stream(computing)  # it isn't given back while kernels of that stream may read it
        return LayerTensors(tensors, placed, placed, self._stream.record_event())

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a layer is small enough to be brought whole."""
        return COPIES * sum(tensor.nbytes for tensor in tensors.values()) <= self._room


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, contiguous, in one wait for a card."""
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"}
    found = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        if tensor.device in devices
        else tensor.contiguous()
        for key, tensor in tensors.items()
    }
    for device in devices:
        torch.accelerator.current_stream(device).synchronize()
    return found


class _OnDemand(Mapping[str, Tensor]):
    """Tensors that are copied to a device whenever they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Uploads:
    """Places layers on several cards, from one pinned copy of them; see ``Upload``."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._uploads = [Upload(device) for device in devices]

    def __call__(self, tensors: Mapping[str, Tensor]) -> list[LayerTensors]:
        taken = any(upload.takes(tensors) for upload in self._uploads)
        pinned = {key: _pinned(tensor) for key, tensor in tensors.items()} if taken else None
        return [upload(tensors, pinned) for upload in self._uploads]


def _pinned(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory, unless it is on a card or empty."""
    return tensor if tensor.device.type != "cpu" or not tensor.numel() else tensor.pin_memory()
