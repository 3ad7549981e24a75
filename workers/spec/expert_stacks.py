"""Experts that a source holds in one tensor, under the names of the linear layers that transformers makes of them.

Llama 4 stores gate_up_proj (E, I, 2 * O) and down_proj (E, I, O), as its experts multiply; a compressed-tensors
checkpoint of it has linear layers, for which transformers and vLLM replace that module. E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from workers.spec.tensors import TensorHeader

_LEAVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class ExpertPart(NamedTuple):
    """One expert's linear layer in a stack: the stack's key, the expert, which of ``parts`` along the outputs."""

    stack: str
    expert: int
    part: int
    parts: int


def split_names(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, ExpertPart, tuple[int, int]]]:
    """The linear layers' keys in a stack, where each is found, and its shape (O, I); none if it is no stack."""
    parent, _, leaf = name.rpartition(".")
    if len(shape) != 3 or not parent.endswith(".experts") or leaf not in _LEAVES:
        return
    experts, columns, rows = shape
    leaves = _LEAVES[leaf]
    for expert in range(experts):
        for part, projection in enumerate(leaves):
            place = ExpertPart(name, expert, part, len(leaves))
            yield f"{parent}.{expert}.{projection}.weight", place, (rows // len(leaves), columns)


def split_experts(tensors: Iterable[TensorHeader]) -> tuple[TensorHeader, ...]:
    """The tensors with one for each linear layer of each expert."""
    found: list[TensorHeader] = []
    for tensor in tensors:
        parts = [TensorHeader(name, shape, tensor.dtype) for name, _, shape in split_names(tensor.name, tensor.shape)]
        found += parts or [tensor]
    return tuple(found)
