"""Cuts a model to its first layers, by its config."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from workers.errors import UnsupportedModel

# Settings that are the number of the text model's layers, beside those that a config class maps to the first.
LAYERS = ("num_hidden_layers", "decoder_layers")


def first_layers(config: Any, count: int) -> Any:
    """A copy of a transformers config for the text model's first ``count`` layers, or all if there are fewer.

    Settings with a value for each layer (``layer_types``, a pattern of letters) are cut with it.

    Raises:
        UnsupportedModel: the config doesn't say how many layers there are.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config(decoder=True)
    number = getattr(text, LAYERS[0], None)
    if number is None:
        raise UnsupportedModel(f"config of {config.model_type}: no {LAYERS[0]} to cut the model by")
    if count >= number:
        return cut
    for name, value in list(vars(text).items()):
        if _for_each_layer(name, value) and len(value) == number:
            setattr(text, name, value[:count])
    for name in LAYERS:
        if hasattr(text, name):
            with suppress(AttributeError):  # counted from a list of layers, which is cut already
                setattr(text, name, count)
    return cut


def _for_each_layer(name: str, value: object) -> bool:
    """Whether a setting may have a value for each layer."""
    if isinstance(value, str):
        return name.endswith("pattern")
    return isinstance(value, list | tuple) and not name.endswith("_token_id")
