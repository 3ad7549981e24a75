"""Turn pydantic's validation errors into messages that name the key, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from workers.spec.base import SLUG, meant

SCHEMA = "(see `quantmill schema`)"
# What a pattern asks for, in words.
PATTERNS = {
    SLUG.pattern: "lower case letters, digits and . _ -, with a letter or digit first",
    r"^[\w.-]+$": "letters, digits and . _ - alone",
    r"^[\w-]+$": "letters, digits, _ and - alone",
    r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$": "letters, digits and . _ -, with a letter or digit at both ends",
}
# What a value should be, and how that is written, by the beginning of pydantic's names of errors.
KINDS = {
    "int": ("a whole number", "write one, as 128"),
    "float": ("a number", "write one, as 0.05"),
    "finite_number": ("a finite number", "write one, as 0.05"),
    "bool": ("true or false", "write one of these"),
    "string": ("a text", "put it in quotes if it is one"),
    "tuple": ("a list", "write it as [a, b]"),
    "list": ("a list", "write it as [a, b]"),
    "dict": ("a mapping", "write it as {key: value}"),
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(error: ValidationError, where: str, content: object, root: type[BaseModel] | None = None) -> str:
    """One line for each finding: its path in the file, what was expected, the value, and the remedy.

    ``content`` is the validated input: paths show only keys that it contains, not pydantic's tags of unions.
    """
    schema = root.model_json_schema() if root else {}
    found = [(tuple(_path(one["loc"], one["type"], content)), one) for one in error.errors(include_url=False)]
    # A tuple with one bad item is also reported as too short, and a union by each of its kinds: keep the innermost.
    paths = {path for path, _ in found}
    inner = [(path, one) for path, one in found if not any(_is_prefix(path, other) for other in paths)]
    lines = dict.fromkeys(f"  {'.'.join(path) or 'the zoo'}: {_said(one, schema)}" for path, one in inner)
    return "\n".join([f"{where}: {len(lines)} problem{'s' if len(lines) > 1 else ''}:", *lines])


def _is_prefix(path: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return len(path) < len(other) and other[: len(path)] == path


def _said(finding: Any, schema: Mapping[str, Any]) -> str:
    """What was expected, what was got, and the remedy."""
    kind, got, ctx = str(finding["type"]), finding["input"], finding.get("ctx", {})
    match kind:
        case "extra_forbidden":
            key = str(finding["loc"][-1])
            hint = meant(key, _keys(schema, inside=len(finding["loc"]) > 1))
            return f"unknown key, got {_short(key)}; {hint}{'Otherwise ' if hint else ''}remove it {SCHEMA}"
        case "missing":
            return f"required, but not given; add it {SCHEMA}"
        case "value_error":
            message = finding["msg"].removeprefix("Value error, ")
            return message if "got " in message else f"{message}, got {_short(got)}"
        case "literal_error" | "enum" | "union_tag_invalid":
            tagged = kind == "union_tag_invalid"
            names = re.findall(r"'([^']*)'|(False|True)", ctx["expected_tags" if tagged else "expected"])
            known = [text or word.lower() for text, word in names]
            value = ctx["tag"] if tagged else got
            what = ctx["discriminator"].strip("'") + ": " if tagged else ""
            return f"{what}expected {_or(known)}, got {_short(value)}; {meant(str(value), known)}Name one of them"
        case "union_tag_not_found":
            key = ctx["discriminator"].strip("'")
            return f"lacks the key {key!r}, by which its kind is known, got {_short(got)}; add {key!r} {SCHEMA}"
        case "string_pattern_mismatch":
            expected = PATTERNS.get(ctx["pattern"], f"the pattern {ctx['pattern']}")
            return f"expected {expected}, got {_short(got)}; rename it"
        case "too_short" | "string_too_short":
            return f"expected at least {ctx['min_length']}, got {_short(got)}; add one"
        case "too_long" | "string_too_long":
            return f"expected at most {ctx['max_length']}, got {len(got)}: {_short(got)}; shorten it"
        case "model_type" | "model_attributes_type":
            return _mapping_expected(ctx.get("class_name", ""), got, schema)
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"expected {words} {ctx[bound]:g}, got {_short(got)}; {'raise' if bound[0] == 'g' else 'lower'} it"
    expected, remedy = next((said for name, said in KINDS.items() if kind.startswith(name)), ("", ""))
    if expected:
        return f"expected {expected}, got {_short(got)}; {remedy}"
    return f"{finding['msg']}, got {_short(got)}; correct it {SCHEMA}"


def _mapping_expected(name: str, got: object, schema: Mapping[str, Any]) -> str:
    """The message for a value that should be a mapping; ``name`` is that of its model."""
    required = schema.get("$defs", {}).get(name, {}).get("required", [])
    keys = f" with {_and(required)}" if required else ""
    example = ", ".join(f"{key}: ..." for key in required) or "key: value"
    return f"expected a mapping{keys}, got {_short(got)}; write it as {{{example}}}"


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


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


def _keys(schema: Mapping[str, Any], *, inside: bool) -> list[str]:
    """The keys of the file itself, or those of all mappings inside of it."""
    models = schema.get("$defs", {}).values() if inside else [schema]
    return sorted({key for model in models for key in model.get("properties", {})})


def _short(value: object) -> str:
    # URLs may hold credentials, which must not reach a log.
    text = re.sub(r"(://)[^/@\s]+@", r"\1...@", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
