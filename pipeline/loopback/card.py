"""Read and validate the YAML front matter of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_STRING = "a string"
_STRINGS = "a string or a list of strings"
_EXPECTED = {
    "license": _STRINGS,
    "license_name": _STRING,
    "license_link": _STRING,
    "language": _STRINGS,
    "tags": _STRINGS,
    "datasets": _STRINGS,
    "base_model": _STRINGS,
    "library_name": _STRING,
    "pipeline_tag": _STRING,
    "base_model_relation": _STRING,
}
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


def front_matter(text: str) -> dict[str, Any] | None:
    """The metadata of a card, None if it has none; ValueError if it isn't a YAML mapping."""
    lines = text.lstrip("\ufeff").lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return None
    try:
        data = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not valid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"the metadata must be a mapping, got a {type(data).__name__}")
    return data


def problems(text: str) -> tuple[list[str], list[str]]:
    """All errors and warnings about a card's metadata."""
    try:
        data = front_matter(text)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    return _errors(data), []


def _errors(data: Mapping[str, Any]) -> list[str]:
    errors = [
        f'"{key}" must be {expected}, got {data[key]!r}'
        for key, expected in _EXPECTED.items()
        if data.get(key) is not None and not _is(expected, data[key])
    ]
    relation = data.get("base_model_relation")
    if isinstance(relation, str) and relation not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(_RELATIONS)}, got {relation!r}')
    if not isinstance(data.get("model-index", []), list):
        errors.append(f'"model-index" must be a list, got {data["model-index"]!r}')
    return errors


def _is(expected: str, value: object) -> bool:
    if isinstance(value, list) and expected == _STRINGS:
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)
