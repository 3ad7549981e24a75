"""What calibrated methods need to know of each linear layer's input, gathered while a layer runs.

N tokens, I input features. One set of statistics for each distinct input: q, k and v share one, gate and up share one,
found by the input being the same tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workers.errors import NumericalError, UnsupportedRecipe
from workers.model.loading import InputName, StreamedModel
from workers.model.products import Products
from workers.numerics.precision import add_product

WIDE = 1024


@dataclass
class InputStatistics:
    """Sums over all calibration tokens that a linear layer saw; float32 on the device of the model."""

    count: int
    gram_II: Tensor
    abs_sum_I: Tensor
    abs_max_I: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str) -> InputStatistics:
        """Statistics of no tokens."""
        zeros = torch.zeros(width, device=device)
        return cls(0, torch.zeros(width, width, device=device), zeros.clone(), zeros)

    @classmethod
    def sum(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Statistics of all tokens of the parts."""
        total = cls.empty(len(parts[0].abs_sum_I), parts[0].gram_II.device)
        for part in parts:
            total.count += part.count
            total.gram_II += part.gram_II
            total.abs_sum_I += part.abs_sum_I
            torch.maximum(total.abs_max_I, part.abs_max_I, out=total.abs_max_I)
        return total

    def divided(self, scale_I: Tensor) -> InputStatistics:
        """Statistics of the same tokens with every input divided by its scale: positive float32 [I]."""
        gram_II = self.gram_II / scale_I / scale_I[:, None]
        return InputStatistics(self.count, gram_II, self.abs_sum_I / scale_I, self.abs_max_I / scale_I)

    def add(self, inputs: Tensor, *, magnitudes: bool = True) -> None:
        """Take tokens in: float [..., I]; without ``magnitudes`` their products alone, which takes half the time.

        NaN and Inf stay in the sums, where ``Observer.check`` finds them. Of a wide ``gram_II`` only blocks on the
        diagonal and above are summed up, until ``complete``.
        """
        x_NI = inputs.reshape(-1, inputs.shape[-1]).float()
        self.count += len(x_NI)
        width = x_NI.shape[1]
        for start in range(0, width, stride := _stride(width)):
            rows = slice(start, start + stride)
            add_product(self.gram_II[rows, start:], x_NI[:, rows].T, x_NI[:, start:])
        if not magnitudes:
            return
        magnitude = x_NI.abs()
        self.abs_sum_I += magnitude.sum(0)
        torch.maximum(self.abs_max_I, magnitude.amax(0) if len(x_NI) else self.abs_max_I, out=self.abs_max_I)

    def complete(self) -> None:
        """Mirror what lies above the diagonal, once all tokens are in."""
        width = len(self.abs_sum_I)
        for start in range(0, width, stride := _stride(width)):
            stop = start + stride
            self.gram_II[stop:, start:stop] = self.gram_II[start:stop, stop:].T


def _stride(width: int) -> int:
    """Rows of a block: wide sums take two thirds of the time without what lies below the diagonal."""
    return width if width < WIDE else -(-width // 4)


class InputWatcher(ABC):
    """Sees the inputs of one layer's linear modules and fused experts, while it runs.

    With ``all_tokens`` every expert is shown all tokens of its layer, else those that are sent to it.
    """

    def __init__(self, *, all_tokens: bool) -> None:
        self._all_tokens = all_tokens
        self._current: dict[int, tuple[Tensor, InputName]] = {}

    @abstractmethod
    def take(self, name: InputName, inputs: Tensor) -> None:
        """An input comes: float [..., I]."""

    @abstractmethod
    def share(self, name: InputName, leader: InputName) -> None:
        """The input that has come to ``leader`` comes to another weight."""

    @contextmanager
    def watching(self, streamed: StreamedModel, inputs: Iterable[InputName]) -> Iterator[None]:
        """See these inputs of a loaded layer while the context lasts."""
        self._current = {}
        with ExitStack() as stack:
            stack.callback(self._current.clear)
            fused: dict[str, list[str]] = {}
            for parameter, expert in inputs:
                module, _, leaf = parameter.rpartition(".")
                if expert is None:
                    hook = self._hook(InputName(parameter, None))
                    handle = streamed.model.get_submodule(module).register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
                elif leaf not in fused.setdefault(module, []):
                    fused[module].append(leaf)
            for module, leaves in fused.items():
                stack.enter_context(self._experts(streamed.model.get_submodule(module), module, leaves))
            yield

    def _hook(self, name: InputName) -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                self._see(name, inputs[0])

        return before

    def _see(self, name: InputName, inputs: Tensor) -> None:
        """Count an input once, whichever of those that share it comes first."""
        held = self._current.get(id(inputs))
        if held is not None and held[0] is inputs and held[1] != name:
            self.share(name, held[1])
            return
        self.take(name, inputs)
        # Holding the tensor keeps its id from being given to another.
        self._current = {id(inputs): (inputs, name)}

    @contextmanager
    def _experts(self, module: nn.Module, name: str, leaves: list[str]) -> Iterator[None]:
        """See the products with slices of 3-D parameters while the module's forward runs."""
        plain = module.forward
        parameters = [(f"{name}.{leaf}", module.get_parameter(leaf)) for leaf in leaves]

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._all_tokens:
                with Products(parameters, self._see):
                    return plain(*args, **kwargs)
            with Products(parameters, self._see):
                plain(*_to_all_experts(module, name, args, kwargs))
            return plain(*args, **kwargs)

        module.forward = watched
        try:
            yield
        finally:
            del module.forward


def inputs_of(streamed: StreamedModel, layer: int) -> list[InputName]:
    """The inputs of a layer's quantizable weights."""
    return list(dict.fromkeys(weight.input for weight in streamed.weights if weight.layer == layer))


class Observer(InputWatcher):
    """Gathers the statistics of one layer at a time; ``of`` tells them after the layer has run.

    ``experts``: whether an expert learns from the tokens sent to it (``routed``) or from all of its layer (``all``).
    An expert that fewer than ``minimum_tokens`` came to takes the statistics of its layer's experts together. Without
    ``magnitudes``, ``abs_sum_I`` and ``abs_max_I`` stay zero.
    """

    def __init__(
        self, experts: Literal["routed", "all"] = "routed", minimum_tokens: int = 0, *, magnitudes: bool = True
    ) -> None:
        super().__init__(all_tokens=experts == "all")
        self._magnitudes = magnitudes
        self._minimum = minimum_tokens
        self._groups: dict[InputName, InputStatistics] = {}
        self._leaders: list[InputName] = []
        self._together: dict[str, InputStatistics] = {}
        self._borrowing: dict[InputName, int] = {}

    def of(self, name: InputName) -> InputStatistics | None:
        """Statistics of a weight's input; None if nothing ever came in."""
        if name in self._borrowing:
            return self._together.get(name[0])
        return self._groups.get(name)

    def borrowed(self, name: InputName) -> int | None:
        """How many tokens came to an expert that takes the statistics of all; None if it has enough of its own."""
        return self._borrowing.get(name)

    def check(self, layer: int) -> None:
        """Refuse statistics that hold NaN or Inf.

        Raises:
            NumericalError: naming the layer and the weight.
        """
        for name in self._leaders:
            if not bool(torch.isfinite(self._groups[name].gram_II.diagonal()).all()):
                raise NumericalError(
                    f"activations: NaN or Inf in the input of {name[0]} (layer {layer}); the model overflows in this "
                    "dtype, or its weights are broken"
                )

    def _pool(self, expected: Iterable[InputName]) -> None:
        """Find the experts that have too few tokens, and add up what all experts of their layer saw."""
        for name in expected:
            if name[1] is None:
                continue
            own = self._groups.get(name)
            count = own.count if own is not None else 0
            if count < max(self._minimum, 1):
                self._borrowing[name] = count
        for parameter in dict.fromkeys(name[0] for name in self._borrowing):
            seen = [self._groups[name] for name in self._leaders if name[0] == parameter]
            if seen:
                self._together[parameter] = InputStatistics.sum(seen)

    @contextmanager
    def watch(self, streamed: StreamedModel, layer: int) -> Iterator[None]:
        """Gather while the context lasts, from the layer's linear modules and fused experts."""
        inputs = inputs_of(streamed, layer)
        with self.gathering(inputs), self.watching(streamed, inputs):
            yield

    @contextmanager
    def gathering(self, inputs: Iterable[InputName]) -> Iterator[None]:
        """Gather what is shown while the context lasts, of a layer that has these inputs."""
        self._groups, self._leaders = {}, []
        self._together, self._borrowing = {}, {}
        yield
        for name in self._leaders:
            self._groups[name].complete()
        self._pool(inputs)

    def take(self, name: InputName, inputs: Tensor) -> None:
        """Count an input."""
        if name not in self._groups:
            self._groups[name] = InputStatistics.empty(inputs.shape[-1], inputs.device)
            self._leaders.append(name)
        self._groups[name].add(inputs, magnitudes=self._magnitudes)

    def share(self, name: InputName, leader: InputName) -> None:
        """An input that is counted already."""
        self._groups[name] = self._groups[leader]


def _to_all_experts(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of a fused experts' forward (hidden states, chosen experts, their weights), every expert chosen.

    Raises:
        UnsupportedRecipe: a forward with other arguments.
    """
    try:
        bound = signature(type(module).forward).bind(module, *args, **kwargs).arguments
        hidden, chosen, weights = (bound[key] for key in ("hidden_states", "top_k_index", "top_k_weights"))
    except (TypeError, KeyError) as error:
        raise UnsupportedRecipe(
            f"calibration.experts: 'all' is not possible for {name} ({type(module).__name__}), whose forward takes "
            "other arguments than transformers' fused experts; set calibration.experts: routed"
        ) from error
    count = next(iter(module.parameters())).shape[0]
    everyone = torch.arange(count, device=chosen.device, dtype=chosen.dtype).expand(*chosen.shape[:-1], count)
    return hidden, everyone, weights.new_zeros(everyone.shape)
