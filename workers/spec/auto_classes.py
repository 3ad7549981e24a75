"""Which class of the installed transformers builds a checkpoint: its auto classes' tables, read from their source.

Nothing of transformers is imported: the driver asks, too.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from workers.spec.families import DEFAULT_LOADER, family_of


class AutoClass(NamedTuple):
    """An auto class that quantmill loads models with, and the name of transformers' table for it."""

    loader: str
    table: str


# In the order of looking: a class that stands in several tables is loaded by the first.
AUTO_CLASSES = (
    AutoClass(DEFAULT_LOADER, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    AutoClass("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    AutoClass("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
)


# Files that say how pictures and sounds are prepared.
PREPARED_BY = ("processor_config.json", "preprocessor_config.json")


def loader_of(config: Mapping[str, Any]) -> str:
    """The auto class that builds the class which a config.json names, so that an artifact is what its source is.

    AutoModelForCausalLM if the class is unknown, or transformers isn't installed here.
    """
    kind = config.get("model_type")
    if (row := family_of(kind)).loader != DEFAULT_LOADER:
        return row.loader
    named = set(config.get("architectures") or ())
    holding = [auto.loader for auto in AUTO_CLASSES if kind in classes(auto.table)]
    building = [auto.loader for auto in AUTO_CLASSES if classes(auto.table).get(str(kind)) in named]
    # Without a class, and for a causal LM's class under another name: the first that knows the type.
    return (building or holding or [DEFAULT_LOADER])[0]


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether the class that a config.json names takes pictures or sounds, too."""
    kind, named = str(config.get("model_type")), set(config.get("architectures") or ())
    return any(classes(auto.table).get(kind) in named for auto in AUTO_CLASSES[1:])


def known_types() -> frozenset[str]:
    """Model types that one of the auto classes builds; empty if transformers isn't installed here."""
    return frozenset(kind for auto in AUTO_CLASSES for kind in classes(auto.table))


@cache
def classes(table: str) -> Mapping[str, str]:
    """A table of transformers: names of classes by model type; empty if it isn't installed, or has no such table."""
    return _tables().get(table, {})


@cache
def _tables() -> Mapping[str, Mapping[str, str]]:
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return {}
    path = Path(found.submodule_search_locations[0]) / "models/auto/modeling_auto.py"
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    tables: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name):
                tables[target.id] = _table(node.value, tables)
    return tables


def _table(value: ast.expr, tables: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The pairs of texts in an expression, and those of the tables that it names."""
    pairs: dict[str, str] = {}
    for node in ast.walk(value):
        if isinstance(node, ast.Name) and node.id in tables:
            pairs |= tables[node.id]
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            key, name = (item.value if isinstance(item, ast.Constant) else None for item in node.elts)
            if isinstance(key, str):
                pairs[key] = name if isinstance(name, str) else ""
    return pairs
