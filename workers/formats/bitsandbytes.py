"""Reads the bitsandbytes format: decodes stored tensors to a float weight with the library's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from workers.checkpoint.source import Header, Source
from workers.formats.decoder import Decoder
from workers.model.loading import build_on_meta, owners_of_keys

# Stored names of a 4-bit weight's state, which is JSON; they end in the codebook's name.
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
    """Return shape and dtype of :func:`decode`'s result; ``read`` reads a stored tensor by its name."""
    if "SCB" in stored:
        shape, dtype = stored["weight"].shape, torch.float32
    else:
        state = bnb.utils.unpack_tensor_to_dict(next(read(name) for name in STATES if name in stored))
        shape, dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
    return Header(shape[::-1] if transposed else shape, dtype)


def decode(stored: Mapping[str, Tensor], *, transposed: bool) -> Tensor:
    """Decode one weight from its module's tensors, given by their names within the module.

    4-bit: in the dtype of the checkpoint that was quantized; LLM.int8: float32 ``codes * SCB / 127`` (arXiv 2208.07339,
    section 2.1). Returns (out, in), or (in, out) if ``transposed``, the source's orientation of a Conv1D.
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
    # Blocks continue across row ends. The CPU kernel of bitsandbytes 0.50.2 starts a new block at each row, which is
    # wrong unless 64 divides the width; on one long row it is correct, and equal to CUDA's.
    state.shape = (shape.numel(),)
    # Codes may be packed in the dtype of the other weights, for FSDP.
    packed = codes.reshape(-1).view(torch.uint8)[:, None]
    flat: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return flat.reshape(shape)


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``."""
    # The stored tensors don't show whether a module is a Conv1D, whose weight must be transposed: the model does.
    model = build_on_meta(source.folder, torch.float32, trust_remote_code)
    conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    owners = owners_of_keys(model, source.headers)
    stored_as = {key.removesuffix(".weight"): owner.removesuffix(".weight") for key, owner in owners.items()}
    transposed = {name for name, owner in stored_as.items() if owner in conv1d}
    return Decoder(
        anchors=ANCHORS,
        suffixes=SUFFIXES,
        required=("weight",),
        header=lambda module, headers, read: header(headers, read, transposed=module in transposed),
        decode=lambda module, stored: decode(stored, transposed=module in transposed),
        facts=STATES,
    )
