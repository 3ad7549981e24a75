"""Inputs of quantized layers rounded as the runtime rounds them, while our own decoder computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from workers.checkpoint import Source
from workers.formats.decoded import Decoded
from workers.loading import StreamedModel


@contextmanager
def rounded_inputs(streamed: StreamedModel, artifact: Source | Decoded) -> Iterator[None]:
    """Round the inputs of ``streamed``'s linear modules as ``artifact`` declares it, while the context lasts.

    Experts that transformers fuses get their inputs as they are.
    """
    with ExitStack() as stack:
        if isinstance(artifact, Decoded):
            kind = streamed.device.partition(":")[0]
            for weight in streamed.weights:
                if weight.module not in artifact.quantized or weight.input[1] is not None:
                    continue
                rounding = artifact.input_rounding(weight.module, kind)
                if rounding is not None:
                    module = streamed.model.get_submodule(weight.input[0].rpartition(".")[0])
                    stack.callback(module.register_forward_pre_hook(_before(rounding)).remove)
        yield


def _before(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return before
