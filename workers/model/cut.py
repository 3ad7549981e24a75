"""Cuts a model to its first layers, by its config."""

from __future__ import annotations

from typing import Any

LAYERS = "num_hidden_layers"


def first_layers(config: Any, count: int) -> Any:
    """A copy of a transformers config for the text model's first ``count`` layers, or all if there are fewer.

    Settings with a value for each layer (``layer_types``, a pattern of letters) are cut with it.
    """
    content = config.to_dict()
    text = config.get_text_config(decoder=True)
    part = content if text is config else _part(content, config, text)
    names = {LAYERS, getattr(text, "attribute_map", {}).get(LAYERS, LAYERS)}
    number = getattr(text, LAYERS)
    if count >= number:
        return config
    for name, value in part.items():
        if name in names:
            part[name] = count
        elif _for_each_layer(name, value) and len(value) == number:
            part[name] = value[:count]
    return type(config).from_dict(content)


def _for_each_layer(name: str, value: object) -> bool:
    """Whether a setting may have a value for each layer."""
    if isinstance(value, str):
        return name.endswith("pattern")
    return isinstance(value, list | tuple) and not name.endswith("_token_id")


def _part(content: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The nested settings of ``text``, within those of ``config``."""
    name = next(name for name in content if getattr(config, name, None) is text)
    part: dict[str, Any] = content[name]
    return part
