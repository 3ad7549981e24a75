"""pydantic's findings in words that name the thing, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, where: str, content: object, root: type[BaseModel] | None = None) -> str:
    """One line for each finding: the path in the file, what was got, what was expected.

    ``content`` is what was validated: of pydantic's paths, only what stands in it is shown, not the tags of unions.
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


def _path(loc: tuple[int | str, ...], kind: str, content: object) -> Iterator[str]:
    """The parts of a finding's path that stand in the file; one that is missing there ends it."""
    here = content
    for position, part in enumerate(loc):
        in_list = isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        if in_list or (isinstance(here, Mapping) and part in here):
            here = here[part]  # type: ignore[index]
        elif kind != "missing" or position < len(loc) - 1:
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
    # Whoever writes a password into an address doesn't want to read it in a log.
    text = re.sub(r"(://)[^/@\s]+@", r"\1...@", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
