"""What runtimes fuse into one layer: its members must have one scheme, and share a tensor's global scale.

Learnt from vLLM's ``packed_modules_mapping`` (0.32); SGLang and TensorRT-LLM fuse the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# Leaves of module names that become one layer, where they have the same parent.
FUSED: tuple[frozenset[str], ...] = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"query", "key", "value"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_a", "in_proj_b"}),
)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
_GROUP_OF = {leaf: number for number, leaves in enumerate(FUSED) for leaf in leaves}


def fused_group(module: str) -> str | None:
    """A name of the fused layer that a module (by its name in the checkpoint) is a part of; None: it stays alone."""
    parent, _, leaf = module.rpartition(".")
    number = _GROUP_OF.get(leaf)
    return None if number is None else f"{parent}#{number}"


def split_groups(schemes: Mapping[str, object]) -> list[list[str]]:
    """The modules of each fused layer whose parts have several schemes; ``schemes`` by module, None: half precision.

    All experts of a layer become one, too.
    """
    groups: dict[str, dict[str, object]] = defaultdict(dict)
    for module, scheme in schemes.items():
        if (group := fused_group(module)) is not None:
            groups[group][module] = scheme
        if (found := _EXPERT.match(module)) is not None:
            groups[found[1]][module] = scheme
    return [sorted(members) for members in groups.values() if len(set(members.values())) > 1]


def together(modules: Iterable[str]) -> list[list[str]]:
    """Modules by the layer that they are fused into; those that stay alone by themselves, in order."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(fused_group(module) or module, []).append(module)
    return list(groups.values())
