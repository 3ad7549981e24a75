"""What the first layer makes of an error in the embeddings: W^T W of its weights on normed inputs.

I features of the embeddings, O outputs of a weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from workers.checkpoint.source import TensorSource
from workers.model.loading import StreamedModel

# A layer's norms, and the weights that multiply what they give; the first that the layer has of each line.
ATTENTION = (("input_layernorm", re.compile(r"\.(q|k|v|qkv)_proj\.weight$")),)
FEED_FORWARD = tuple(
    (norm, re.compile(r"\.(gate|up|gate_up)_proj\.weight$"))
    for norm in ("pre_feedforward_layernorm", "post_attention_layernorm")
)
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def gram(streamed: StreamedModel, source: TensorSource, width: int) -> Tensor | None:
    """W^T W with a mean diagonal of one, float32 [I, I], the mean over experts; None: no norms of the usual names."""
    keys = streamed.keys_of_layer(0)
    total_II, found = torch.zeros(width, width), False
    for choices in (ATTENTION, FEED_FORWARD):
        norms = dict(streamed.layers[0].named_children())
        named = next(((norms[norm], norm, pattern) for norm, pattern in choices if norm in norms), None)
        if named is None:
            continue
        norm, name, pattern = named
        gain_I = _gain(norm, {key.rpartition(".")[2]: source.read(key) for key in keys if f".{name}." in key}, width)
        matrices = [key for key in keys if pattern.search(key) and source.headers[key].shape[-1] == width]
        if gain_I is None or not matrices:
            continue
        for key in matrices:
            matrix_OI = source.read(key).float() * gain_I
            total_II += matrix_OI.T @ matrix_OI / (_experts(matrices) if EXPERT.search(key) else 1)
        found = True
    return total_II / total_II.diagonal().mean().clamp(min=1e-30) if found else None


def _experts(keys: Sequence[str]) -> int:
    return len({number[1] for key in keys if (number := EXPERT.search(key))})


def _gain(norm: nn.Module, tensors: Mapping[str, Tensor], width: int) -> Tensor | None:
    """What a norm multiplies its inputs with once they have a mean square of one, float32 [I]; None: of another width.

    Told by what it makes of inputs of one and minus one, for some norms add one to their weight, and some a bias.
    """
    if any(tensor.shape != (width,) for tensor in tensors.values()) or not tensors or width % 2:
        return None
    own = copy.deepcopy(norm).to_empty(device="cpu").float()
    own.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    signs_I = torch.ones(width)
    signs_I[1::2] = -1
    with torch.no_grad():
        gain_I: Tensor = (own(signs_I[None]) - own(-signs_I[None]))[0] / 2 * signs_I
    return gain_I
