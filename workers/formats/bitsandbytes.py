"""The bitsandbytes format, read: stored tensors back to a float weight, with the library's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import bitsandbytes as bnb
import torch
from torch import Tensor

from workers.checkpoint import Header

# The state of a 4-bit weight, in JSON, under the name of its codebook.
STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
ANCHORS = (*STATES, "SCB")
SUFFIXES = (
    "weight",
    *ANCHORS,
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
)


def header(stored: Mapping[str, Header], read: Callable[[str], Tensor], *, transposed: bool) -> Header:
    """Return shape and dtype of what :func:`decode` gives; ``read`` reads a stored tensor by its name."""
    if "SCB" in stored:
        shape, dtype = stored["weight"].shape, torch.float32
    else:
        state = bnb.utils.unpack_tensor_to_dict(next(read(name) for name in STATES if name in stored))
        shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    return Header(shape[::-1] if transposed else shape, dtype)


def decode(stored: Mapping[str, Tensor], *, transposed: bool) -> Tensor:
    """Decode one weight from the tensors of its module, given by their names within it.

    4-bit: in the dtype of the checkpoint that was quantized; LLM.int8: float32 ``codes * SCB / 127`` (arXiv 2208.07339,
    section 2.1). Returns (out, in), or (in, out) where ``transposed``: the source's orientation of a Conv1D.
    """
    codes = stored["weight"]
    if "SCB" in stored:
        weight_OI = bnb.functional.int8_vectorwise_dequant(codes, stored["SCB"])
    else:
        weight_OI = _decode_4bit(codes, {name: t for name, t in stored.items() if name.startswith("weight.")})
    weight: Tensor = weight_OI.T.contiguous() if transposed else weight_OI
    return weight


def _decode_4bit(codes: Tensor, state_tensors: dict[str, Tensor]) -> Tensor:
    state = bnb.functional.QuantState.from_dict(state_tensors, codes.device)
    shape = state.shape
    # Blocks run over the ends of rows. The CPU kernel of bitsandbytes 0.50.2 begins a block with each row and is
    # wrong where 64 doesn't divide the width; as one long row it is right, and the same as CUDA's.
    state.shape = (shape.numel(),)
    flat: Tensor = bnb.functional.dequantize_4bit(codes, state)
    return flat.reshape(shape)
