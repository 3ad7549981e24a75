"""Tensors in layers' arguments and outputs: nested tuples, lists and dicts, walked by torch's pytrees.

Anything else, such as a cache or a model's output object, is a leaf and stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, tuple | list | dict)


def leaves(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a structure, each with its path."""
    entries, _ = pytree.tree_flatten_with_path(value, is_leaf=_is_leaf)
    return [(pytree.keystr(path), leaf) for path, leaf in entries if isinstance(leaf, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with ``change`` applied to its tensors."""
    return pytree.tree_map_only(Tensor, change, value, is_leaf=_is_leaf)
