"""Rounds the inputs of quantized layers as the runtime does, while our own decoder computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.checkpoint.source import Source
from workers.formats.decoded import Decoded
from workers.model.key_values import attentions_of, changing
from workers.model.loading import StreamedModel
from workers.numerics.activations import round_fp8_static

# Maximum share of a layer's inputs that a static scale may clip: outliers that calibration didn't see.
MOST_CLIPPED = 0.01


@dataclass
class RoundingCounts:
    """Number of inputs rounded under a static scale per module, and how many of them were clipped."""

    values: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Messages for modules whose static scale clips too many inputs."""
        shares = {module: int(self.clipped[module]) / count for module, count in self.values.items()}
        return [
            f"integrity: {module}: its static scale clips {share:.1%} of inputs, expected at most {MOST_CLIPPED:.0%}"
            for module, share in shares.items()
            if share > MOST_CLIPPED
        ]

    def note(self, module: str, given: Tensor, rounded: Tensor) -> None:
        """Count rounded values, and as clipped those at the largest magnitude that were more than a tenth above it."""
        clipped = (rounded.abs() == rounded.abs().amax()) & (rounded.abs() < 0.9 * given.abs())
        self.values[module] = self.values.get(module, 0) + given.numel()
        count = torch.count_nonzero(clipped)
        self.clipped[module] = self.clipped[module] + count if module in self.clipped else count


@contextmanager
def rounded_inputs(streamed: StreamedModel, artifact: Source | Decoded) -> Iterator[RoundingCounts]:
    """Round the inputs of ``streamed``'s linear modules as ``artifact`` declares, while the context lasts, and the keys
    and values that its attention caches.

    Inputs of experts that transformers fuses aren't rounded.
    """
    counts = RoundingCounts()
    with ExitStack() as stack:
        if isinstance(artifact, Decoded):
            kind = streamed.device.partition(":")[0]
            for weight in streamed.weights:
                if weight.module not in artifact.quantized or weight.input.expert is not None:
                    continue
                rounding = artifact.input_rounding(weight.module, kind)
                if rounding is not None:
                    module = streamed.model.get_submodule(weight.input.parameter.rpartition(".")[0])
                    static = artifact.has_static_input(weight.module)
                    note = partial(counts.note, weight.module) if static else None
                    stack.callback(module.register_forward_pre_hook(_before(rounding, note)).remove)
            if artifact.cache_scales:
                for layer in range(len(streamed.layers)):
                    for name, stored in attentions_of(streamed, layer).items():
                        change = _cached(artifact.scales_of_cache(stored), partial(counts.note, stored))
                        stack.enter_context(changing(streamed.model.get_submodule(name), change))
        yield counts


def _cached(
    scales: tuple[Tensor, Tensor], note: Callable[[Tensor, Tensor], None]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rounded = []
        for tensor, scale in zip((keys, values), scales, strict=True):
            rounded.append(round_fp8_static(tensor, scale.to(tensor.device)))
            note(tensor, rounded[-1])
        return rounded[0], rounded[1]

    return change


def _before(
    rounding: Callable[[Tensor], Tensor], note: Callable[[Tensor, Tensor], None] | None
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        rounded = rounding(inputs[0])
        if note is not None:
            note(inputs[0], rounded)
        return (rounded, *inputs[1:])

    return before
