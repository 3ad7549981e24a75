"""Which parameters a layer multiplies its inputs with: every ``linear`` is shown while the context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workers.model.loading import InputName


class Products(TorchFunctionMode):
    """Calls ``see(name, inputs)`` for every ``linear`` with one of the parameters, or with a slice of one.

    ``parameters`` are given with their names; of one with three dimensions a slice is an expert. ``inputs`` are float
    [..., I].
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], see: Callable[[InputName, Tensor], None]
    ) -> None:
        super().__init__()
        self._by_storage = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters}
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) >= 2:
            inputs, weight = args[0], args[1]
            entry = self._by_storage.get(weight.untyped_storage().data_ptr())
            if entry is not None:
                name, parameter = entry
                expert = weight.storage_offset() // parameter.stride(0) if parameter.dim() == 3 else None
                self._see(InputName(name, expert), inputs)
        return func(*args, **(kwargs or {}))
