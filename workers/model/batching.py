"""Sizes micro-batches in tokens, to fit the device's memory."""

from __future__ import annotations

import math
from typing import Any

import torch

from workers.errors import OutOfMemory
from workers.machine import memory
from workers.machine.card_errors import card_error
from workers.machine.memory import host_memory
from workers.model.loading import StreamedModel
from workers.spec.workspace import MICRO_BATCH_TOKENS

# Share of the device's total memory for one micro-batch's activations. Not of the free memory: the micro-batch size
# affects the last bits of the statistics, and the same job on the same machine must produce the same bytes.
SHARE = 0.125


def micro_batch_tokens(streamed: StreamedModel, sequence_length: int) -> int:
    """Tokens of a micro-batch: at most ``MICRO_BATCH_TOKENS``, at least one sequence."""
    budget = SHARE * _memory(streamed.device)
    fitting = int(budget // bytes_per_token(streamed, sequence_length))
    return max(sequence_length, min(MICRO_BATCH_TOKENS, fitting))


def bytes_per_token(streamed: StreamedModel, sequence_length: int) -> int:
    """Upper bound of one token's activations in bytes while the widest layer runs, attention scores included."""
    widths: dict[int, int] = {}
    for weight in streamed.weights:
        if weight.input.expert in (None, 0):
            widths[weight.layer] = widths.get(weight.layer, 0) + sum(weight.shape_OI)
    scores = 2 * _heads(streamed.model.config.get_text_config()) * sequence_length
    return math.ceil(4 * (max(widths.values(), default=1) + scores))


def _heads(config: Any) -> int:
    """The largest number of attention heads of a text model's layers, which some configs give for each."""
    # Asked for its length, transformers' list of them looks for a number of layers, which not every config has.
    layers = (getattr(config, "per_layer_config", None) if hasattr(config, "num_hidden_layers") else None) or (config,)
    given = [getattr(layer, "num_attention_heads", None) or 1 for layer in layers]
    return max(count if isinstance(count, int) else max(count) for count in given)


def halved(tokens: int, sequence_length: int) -> int | None:
    """The next size (tokens) to try after running out of memory; None at one sequence."""
    return max(tokens // 2, sequence_length) if tokens > sequence_length else None


def ran_out(error: BaseException) -> bool:
    """Whether an error means that a tensor couldn't be allocated; torch has no error class for host memory.

    ``OutOfMemory`` doesn't count: it is raised when smaller micro-batches don't help.
    """
    if isinstance(error, OutOfMemory):
        return False
    on_a_card = isinstance(error, RuntimeError) and isinstance(card_error(error), OutOfMemory)
    return memory.ran_out(error) or isinstance(error, torch.OutOfMemoryError) or on_a_card


def _memory(device: str) -> int:
    if device.startswith("cuda"):
        # Micro-batches of one size run on all cards of this process: they fit the smallest.
        cards = range(torch.cuda.device_count()) if torch.device(device).index is None else [device]
        return min(int(torch.cuda.get_device_properties(card).total_memory) for card in cards)
    return host_memory()
