"""Intercepts the ``linear`` calls of a layer, and reports which parameter each input is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workers.model.loading import InputName


class Products(TorchFunctionMode):
    """Calls ``on_input(name, inputs)`` for every ``linear`` with one of the parameters, or with a slice of one.

    ``parameters`` come with their names; a slice of a 3-D parameter is an expert. ``inputs`` are float [..., I].
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], on_input: Callable[[InputName, Tensor], None]
    ) -> None:
        super().__init__()
        self._by_storage = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters}
        self._on_input = on_input

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) >= 2:
            inputs, weight = args[0], args[1]
            entry = self._by_storage.get(weight.untyped_storage().data_ptr())
            if entry is not None:
                name, parameter = entry
                expert = weight.storage_offset() // parameter.stride(0) if parameter.dim() == 3 else None
                self._on_input(InputName(name, expert), inputs)
        return func(*args, **(kwargs or {}))
