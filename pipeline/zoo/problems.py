"""Turn pydantic's validation errors into messages that name the key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, where: str, content: object, root: type[BaseModel] | None = None) -> str:
    """One line for each finding: its path in the file, the value, and what was expected.

    ``content`` is the validated input: paths show only keys that it contains, not pydantic's tags of unions.
    """
    findings = error.errors(include_url=False)
    # A tuple with one bad item is also reported as too short: keep the innermost finding.
    inner = [finding for finding in findings if not any(_is_prefix(finding["loc"], other["loc"]) for other in findings)]
    lines = [_line(finding, root, content) for finding in inner]
    return "\n".join([f"{where}: {len(lines)} problem{'s' if len(lines) > 1 else ''}:", *dict.fromkeys(lines)])


def _is_prefix(loc: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(loc) < len(other) and other[: len(loc)] == loc


def _line(finding: Any, root: type[BaseModel] | None, content: object) -> str:
    path = ".".join(_path(finding["loc"], finding["type"], content)) or "the zoo"
    got = finding["input"]
    match finding["type"]:
        case "extra_forbidden":
            key = str(finding["loc"][-1])
            return f"  {path}: unknown key, got {key!r}; {_suggest(key, root)}remove it (see `quantmill schema`)"
        case "missing":
            return f"  {path}: required, but not given; add it (see `quantmill schema`)"
        case _:
            message = finding["msg"].removeprefix("Value error, ")
            return f"  {path}: {message}, got {_short(got)}"


def _path(loc: tuple[int | str, ...], finding_type: str, content: object) -> Iterator[str]:
    """The parts of a finding's path that the file contains; a key that is missing there may only come last."""
    value = content
    for position, part in enumerate(loc):
        in_list = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, Mapping) and part in value):
            value = value[part]  # type: ignore[index]
        elif finding_type != "missing" or position < len(loc) - 1:
            continue  # a union's tag
        yield str(part)


def _suggest(key: str, root: type[BaseModel] | None) -> str:
    close = difflib.get_close_matches(key, _all_keys(root) if root else [], n=1)
    return f"did you mean {close[0]!r}? Otherwise " if close else ""


def _all_keys(root: type[BaseModel]) -> list[str]:
    schema = root.model_json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for model in models for key in model.get("properties", {})})


def _short(value: object) -> str:
    # URLs may hold credentials, which must not reach a log.
    text = re.sub(r"(://)[^/@\s]+@", r"\1...@", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
