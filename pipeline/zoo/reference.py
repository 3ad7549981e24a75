"""The JSON Schema of zoo files with a description of every key, and the reference page that is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.zoo.zoo import Zoo

HEAD = """# Keys of a zoo file

Made by `make tables` from the models that read the file; the same as `quantmill schema` prints for editors. Unknown
keys are refused, with a suggestion.
"""
FORMAT = "How codes are stored: one of the formats."
OPTIONS = "Settings of the method."


def schema() -> dict[str, Any]:
    """The JSON Schema of zoo files. A key without a description of its own has that of the model it refers to."""
    made = Zoo.model_json_schema()
    models = made["$defs"]
    for model in [made, *models.values()]:
        for key, value in model.get("properties", {}).items():
            if "description" not in value:
                value["description"] = _description(key, value, model, models)
    return made


def _description(key: str, value: Mapping[str, Any], model: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """What is known of a key that says nothing itself."""
    match key:
        case "format":
            return FORMAT
        case "options":
            return OPTIONS
        case "type" | "method" if "const" in value:
            return str(model["description"]).splitlines()[0]
    named = [models[name]["description"].splitlines()[0] for name in _references(value)]
    return " Or: ".join(dict.fromkeys(named))


def _references(value: Mapping[str, Any]) -> list[str]:
    """Names of the models that a schema refers to."""
    if "$ref" in value:
        return [value["$ref"].rpartition("/")[2]]
    parts = [*value.get("anyOf", ()), *value.get("oneOf", ()), *([value["items"]] if "items" in value else [])]
    return [name for part in parts for name in _references(part)]


def page() -> str:
    """The reference page, as Markdown: a table for each mapping of a zoo file."""
    made = schema()
    models = made["$defs"]
    parts = [HEAD, *_section("The file itself", made)]
    for name in _in_order(made, models):
        parts += _section(name, models[name])
    return "".join(parts)


def _in_order(root: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Names of the models as a reader comes upon them."""
    found: dict[str, None] = {}
    waiting = [root]
    while waiting:
        model = waiting.pop(0)
        for value in model.get("properties", {}).values():
            additional = value.get("additionalProperties")
            within = [value, *([additional] if isinstance(additional, dict) else [])]
            within += [part["additionalProperties"] for part in value.get("anyOf", ()) if _is_map(part)]
            for name in (name for each in within for name in _references(each)):
                if name not in found:
                    found[name] = None
                    waiting.append(models[name])
    return list(found)


def _is_map(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("additionalProperties"), dict)


def _section(name: str, model: Mapping[str, Any]) -> Iterator[str]:
    said = " ".join(str(model.get("description", "")).split("\n\n")[0].split())
    yield f"\n## {name}\n\n{said}\n\n| key | takes | default | says |\n| --- | --- | --- | --- |\n"
    required = model.get("required", ())
    for key, value in model.get("properties", {}).items():
        default = "required" if key in required else f"`{_plain(value.get('default'))}`"
        cells = (f"`{key}`", _takes(value), default, " ".join(value["description"].split()).replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |\n"


def _takes(value: Mapping[str, Any]) -> str:
    """The kinds of value that a key takes, in words."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{_plain(value['const'])}`"
    if value.get("enum"):
        return " ".join(f"`{_plain(each)}`" for each in value["enum"])
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_takes(part) for part in value[union]))
    if value.get("type") == "array":
        return f"list of {_takes(value.get('items', {}))}"
    if value.get("type") == "object":
        return "mapping"
    words = {"string": "text", "integer": "whole number", "boolean": "true, false", "null": "null"}
    bounds = [f"{sign} {value[bound]:g}" for bound, sign in _BOUNDS.items() if bound in value]
    return ", ".join([words.get(str(value.get("type")), "number"), *bounds])


_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def _plain(value: object) -> str:
    """A value as a zoo file writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else str(value)
