"""Gathers the input statistics of each linear layer that calibrated methods need, while the layer runs.

N tokens, I input features. There is one set of statistics for each distinct input: q, k and v share one, gate and up
share one, recognized by the input being the same tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from workers.errors import NumericalError, UnsupportedRecipe
from workers.model import key_values
from workers.model.loading import InputName, StreamedModel
from workers.model.products import Products
from workers.numerics.precision import add_product, sums_halves
from workers.numerics.waits import magnitudes

WIDE = 1024
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class InputStatistics:
    """Sums over all calibration tokens at a linear layer's input; float32 on the model's device."""

    count: int
    gram_II: Tensor
    abs_sum_I: Tensor
    abs_max_I: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str) -> InputStatistics:
        """Statistics of zero tokens."""
        zeros = torch.zeros(width, device=device)
        return cls(0, torch.zeros(width, width, device=device), zeros.clone(), zeros)

    @classmethod
    def sum(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Statistics of the tokens of all parts."""
        total = cls.empty(len(parts[0].abs_sum_I), parts[0].gram_II.device)
        for part in parts:
            total.include(part)
        return total

    def include(self, part: InputStatistics) -> None:
        """Add the tokens of other statistics, of the same device."""
        self.count += part.count
        self.gram_II += part.gram_II
        self.abs_sum_I += part.abs_sum_I
        torch.maximum(self.abs_max_I, part.abs_max_I, out=self.abs_max_I)

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same statistics on a device."""
        moved = (tensor.to(device) for tensor in (self.gram_II, self.abs_sum_I, self.abs_max_I))
        return InputStatistics(self.count, *moved)

    @classmethod
    def of(cls, batches: Iterable[Tensor], device: torch.device | str) -> InputStatistics:
        """Statistics of the decoder's output, float [B, T, I] for each batch: the head's input."""
        total: InputStatistics | None = None
        for batch in batches:
            total = total or cls.empty(batch.shape[-1], device)
            total.add(batch.to(device))
        assert total is not None, "a calibration has tokens"
        total.complete()
        return total

    @classmethod
    def even(cls, width: int, device: torch.device | str) -> InputStatistics:
        """Statistics under which the output's error is the weight's squared error: of uncorrelated, equal inputs."""
        ones = torch.ones(width, device=device)
        return cls(width, torch.eye(width, device=device), ones.clone(), ones)

    def normalized(self) -> InputStatistics:
        """Statistics of the same tokens, divided so that the mean square of an input is one in sum."""
        scale_I = self.gram_II.diagonal().mean().sqrt().clamp(min=1e-30).expand(len(self.abs_sum_I))
        return self.divided(scale_I)

    def divided(self, scale_I: Tensor) -> InputStatistics:
        """Statistics of the same tokens with every input divided by ``scale_I`` (positive float32 [I])."""
        gram_II = self.gram_II / scale_I / scale_I[:, None]
        return InputStatistics(self.count, gram_II, self.abs_sum_I / scale_I, self.abs_max_I / scale_I)

    def add(self, inputs: Tensor, *, magnitudes: bool = True) -> None:
        """Add tokens, float [..., I]; without ``magnitudes`` only to ``gram_II``, which takes half the time.

        NaN and Inf stay in the sums, and ``Observer.check`` reports them. Of a wide ``gram_II`` only blocks on and
        above the diagonal are summed, until ``complete`` mirrors them.
        """
        x_NI = inputs.reshape(-1, inputs.shape[-1])
        if x_NI.dtype not in HALVES or not sums_halves(x_NI.device):
            x_NI = x_NI.float()
        self.count += len(x_NI)
        width = x_NI.shape[1]
        for start in range(0, width, stride := _stride(width)):
            rows = slice(start, start + stride)
            add_product(self.gram_II[rows, start:], x_NI[:, rows].T, x_NI[:, start:])
        if not magnitudes:
            return
        magnitude = x_NI.abs()
        self.abs_sum_I += magnitude.sum(0, dtype=torch.float32)
        largest_I = magnitude.amax(0).float() if len(x_NI) else self.abs_max_I
        torch.maximum(self.abs_max_I, largest_I, out=self.abs_max_I)

    def complete(self) -> None:
        """Mirror the blocks above the diagonal, once all tokens are added."""
        width = len(self.abs_sum_I)
        for start in range(0, width, stride := _stride(width)):
            stop = start + stride
            self.gram_II[stop:, start:stop] = self.gram_II[start:stop, stop:].T


def _stride(width: int) -> int:
    """Rows per block: without the blocks below the diagonal, wide sums take two thirds of the time."""
    return width if width < WIDE else -(-width // 4)


class InputWatcher(ABC):
    """Watches the inputs of one layer's linear modules and fused experts while it runs.

    With ``all_tokens`` every expert is shown all tokens of its layer, otherwise only those routed to it.
    """

    def __init__(self, *, all_tokens: bool) -> None:
        self._all_tokens = all_tokens
        self._current: dict[int, tuple[Tensor, InputName]] = {}

    @abstractmethod
    def take(self, name: InputName, inputs: Tensor) -> None:
        """Handle a new input of a weight: float [..., I]."""

    @abstractmethod
    def share(self, name: InputName, leader: InputName) -> None:
        """Handle an input of a weight that ``leader`` has already taken."""

    @contextmanager
    def watching(self, streamed: StreamedModel, inputs: Iterable[InputName]) -> Iterator[None]:
        """Watch these inputs of a loaded layer while the context lasts."""
        self._current = {}
        with ExitStack() as stack:
            stack.callback(self._current.clear)
            fused: dict[str, list[str]] = {}
            for parameter, expert in inputs:
                module, _, leaf = parameter.rpartition(".")
                if leaf == key_values.KEYS:
                    visit = self._key_values(module)
                    stack.enter_context(key_values.changing(streamed.model.get_submodule(module), visit))
                elif leaf == key_values.VALUES:
                    continue  # with its keys
                elif expert is None:
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

    def _key_values(self, module: str) -> Any:
        def visit(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            for leaf, tensor in ((key_values.KEYS, keys), (key_values.VALUES, values)):
                # The largest magnitudes are all that a scale needs.
                self.take(InputName(f"{module}.{leaf}", None), tensor.abs().amax((0, 1, 2))[None])
            return keys, values

        return visit

    def _see(self, name: InputName, inputs: Tensor) -> None:
        """Take an input once, for the first of the weights that share it."""
        previous = self._current.get(id(inputs))
        if previous is not None and previous[0] is inputs and previous[1] != name:
            self.share(name, previous[1])
            return
        self.take(name, inputs)
        # Holding the tensor keeps its id from being reused.
        self._current = {id(inputs): (inputs, name)}

    @contextmanager
    def _experts(self, module: nn.Module, name: str, leaves: list[str]) -> Iterator[None]:
        """Watch the products with slices of 3-D parameters while the module's forward runs."""
        original = module.forward
        parameters = [(f"{name}.{leaf}", module.get_parameter(leaf)) for leaf in leaves]

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._all_tokens:
                with Products(parameters, self._see):
                    return original(*args, **kwargs)
            with Products(parameters, self._see):
                original(*_to_all_experts(module, name, args, kwargs))
            return original(*args, **kwargs)

        module.forward = watched
        try:
            yield
        finally:
            del module.forward


def inputs_of(streamed: StreamedModel, layer: int, *, keys_and_values: bool = False) -> list[InputName]:
    """Distinct inputs of a layer's quantizable weights; also the keys and values that its attention caches."""
    inputs = list(dict.fromkeys(weight.input for weight in streamed.weights if weight.layer == layer))
    attentions = key_values.attentions_of(streamed, layer) if keys_and_values else {}
    leaves = (key_values.KEYS, key_values.VALUES)
    return [*inputs, *(InputName(f"{module}.{leaf}", None) for module in attentions for leaf in leaves)]


class Observer(InputWatcher):
    """Gathers the statistics of one layer at a time; read them with ``of`` after the layer has run.

    ``experts``: whether an expert's statistics cover the tokens routed to it (``routed``) or all tokens of its layer
    (``all``). An expert with fewer than ``minimum_tokens`` tokens uses the sum over all experts of its layer. Without
    ``magnitudes``, ``abs_sum_I`` and ``abs_max_I`` stay zero. With ``keys_and_values``, those that attention caches are
    inputs, too (``MODULE.k_scale`` and ``MODULE.v_scale``), with their largest magnitudes alone.
    """

    def __init__(
        self,
        experts: Literal["routed", "all"] = "routed",
        minimum_tokens: int = 0,
        *,
        magnitudes: bool = True,
        keys_and_values: bool = False,
    ) -> None:
        super().__init__(all_tokens=experts == "all")
        self._magnitudes, self._keys_and_values = magnitudes, keys_and_values
        self._minimum = minimum_tokens
        self._groups: dict[InputName, InputStatistics] = {}
        self._leaders: list[InputName] = []
        self._together: dict[str, InputStatistics] = {}
        self._borrowing: dict[InputName, int] = {}

    def anew(self) -> Observer:
        """Another observer with the same settings, which has gathered nothing."""
        return Observer(
            "all" if self._all_tokens else "routed",
            self._minimum,
            magnitudes=self._magnitudes,
            keys_and_values=self._keys_and_values,
        )

    def of(self, name: InputName) -> InputStatistics | None:
        """Statistics of a weight's input; None if it received no tokens."""
        if name in self._borrowing:
            return self._together.get(name[0])
        return self._groups.get(name)

    def distinct(self) -> list[InputStatistics]:
        """All statistics, those that inputs share once."""
        return [*(self._groups[name] for name in self._leaders), *self._together.values()]

    def borrowed(self, name: InputName) -> int | None:
        """Number of tokens of an expert that uses the sum over all experts; None if it has enough of its own."""
        return self._borrowing.get(name)

    def tokens_of_experts(self) -> list[int]:
        """Tokens that came to each expert of the layer, in ascending order; empty if it has none."""
        counts = {name: statistics.count for name, statistics in self._groups.items()} | self._borrowing
        by_expert: dict[int, int] = {}
        for name, count in counts.items():
            if name.expert is not None:
                by_expert[name.expert] = max(count, by_expert.get(name.expert, 0))
        return sorted(by_expert.values())

    def check(self, layer: int) -> None:
        """Refuse statistics that contain NaN or Inf.

        Raises:
            NumericalError: names the layer and the weight.
        """
        # One after the other they would be a wait each.
        largest = magnitudes([self._groups[name].gram_II.diagonal() for name in self._leaders])
        for name, magnitude in zip(self._leaders, largest, strict=True):
            if not math.isfinite(magnitude):
                raise NumericalError(
                    f"activations: NaN or Inf in the input of {name[0]} (layer {layer}); the model overflows in this "
                    "dtype, or its weights are broken"
                )

    def _pool(self, expected: Iterable[InputName]) -> None:
        """Find the experts with too few tokens, and sum the statistics of all experts of their layer."""
        for name in expected:
            if name[1] is None:
                continue
            statistics = self._groups.get(name)
            count = statistics.count if statistics is not None else 0
            if count < max(self._minimum, 1):
                self._borrowing[name] = count
        for parameter in dict.fromkeys(name[0] for name in self._borrowing):
            seen = [self._groups[name] for name in self._leaders if name[0] == parameter]
            if seen:
                self._together[parameter] = InputStatistics.sum(seen)

    def inputs(self, streamed: StreamedModel, layer: int) -> list[InputName]:
        """The inputs of a layer that it gathers."""
        return inputs_of(streamed, layer, keys_and_values=self._keys_and_values)

    @contextmanager
    def watch(self, streamed: StreamedModel, layer: int) -> Iterator[None]:
        """Gather from the layer's linear modules and fused experts while the context lasts."""
        inputs = self.inputs(streamed, layer)
        with self.gathering(inputs), self.watching(streamed, inputs):
            yield

    @contextmanager
    def gathering(self, inputs: Iterable[InputName]) -> Iterator[None]:
        """Gather the inputs passed to ``take`` while the context lasts, for a layer with these inputs."""
        self._groups, self._leaders = {}, []
        self._together, self._borrowing = {}, {}
        yield
        for name in self._leaders:
            self._groups[name].complete()
        self._pool(inputs)

    def add(self, other: Observer, inputs: Iterable[InputName], device: torch.device) -> None:
        """Add what another observer has gathered of the same layer, with these inputs, on another card.

        All statistics are on ``device`` then. ``other`` isn't to be used any more.
        """
        leaders = {id(other._groups[name]): name for name in other._leaders}
        for name, statistics in other._groups.items():
            leader = leaders[id(statistics)]
            if name != leader:
                self._groups.setdefault(name, self._groups[leader])
            elif name in self._groups:
                assert name in self._leaders, "all cards see a layer's inputs in one order"
                self._groups[name].include(statistics.to(device))
            else:
                self._groups[name] = statistics.to(device)
                self._leaders.append(name)
        self._together, self._borrowing = {}, {}
        self._pool(inputs)

    def take(self, name: InputName, inputs: Tensor) -> None:
        """Add an input's tokens."""
        if name not in self._groups:
            self._groups[name] = InputStatistics.empty(inputs.shape[-1], inputs.device)
            self._leaders.append(name)
        cached = name.parameter.rpartition(".")[2] in (key_values.KEYS, key_values.VALUES)
        self._groups[name].add(inputs, magnitudes=self._magnitudes or cached)

    def share(self, name: InputName, leader: InputName) -> None:
        """Reuse the statistics of an input that is already added."""
        self._groups[name] = self._groups[leader]


class Statistics(Protocol):
    """What makers read of a layer's observer."""

    def of(self, name: InputName) -> InputStatistics | None:
        """As ``Observer.of``."""

    def borrowed(self, name: InputName) -> int | None:
        """As ``Observer.borrowed``."""


class CopiedStatistics:
    """An observer's statistics on another device, copied there at once; what shares statistics there shares them here.

    Later, a copy would wait for all that the other card has been given to do.
    """

    def __init__(self, observer: Observer, device: torch.device) -> None:
        self._observer = observer
        self._copies = {id(statistics): statistics.to(device) for statistics in observer.distinct()}

    def of(self, name: InputName) -> InputStatistics | None:
        """As ``Observer.of``."""
        found = self._observer.of(name)
        return None if found is None else self._copies[id(found)]

    def borrowed(self, name: InputName) -> int | None:
        """As ``Observer.borrowed``."""
        return self._observer.borrowed(name)


def _to_all_experts(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a fused experts' forward (hidden states, chosen experts, their weights) that choose every expert.

    Raises:
        UnsupportedRecipe: the forward takes other arguments.
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
