"""The engines that take part in the pass: which maker makes an artifact, and what is known of one that is made.

Every name here is an engine of ``spec.engines`` without a script; those with one are called by ``engines.whole``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workers.engines.maker import Maker
from workers.model.loading import StreamedModel
from workers.spec import engines
from workers.spec.layers import Layout
from workers.spec.recipes import BitsAndBytesRecipe, Recipe
from workers.spec.schemes import Scheme
from workers.spec.workspace import layout_path


def _linear() -> type[Maker]:
    from workers.engines.linear import LinearMaker

    return LinearMaker


def _bitsandbytes() -> type[Maker]:
    from workers.engines.bitsandbytes import BitsAndBytesMaker  # importing the library takes seconds

    return BitsAndBytesMaker


MAKERS: dict[str, Callable[[], type[Maker]]] = {
    engines.LINEAR.name: _linear,
    engines.BITSANDBYTES.name: _bitsandbytes,
}


def maker_class(recipe: Recipe) -> type[Maker]:
    """The maker for a recipe; a library is only imported where a recipe needs it."""
    return MAKERS[recipe.engine]()


def layout_of(place: Path, recipe: Recipe, streamed: StreamedModel) -> Layout:
    """What the engine of an artifact in ``place`` decided; decided again where releases before layouts made it."""
    stored = layout_path(place)
    if stored.is_file():
        return Layout.model_validate_json(stored.read_text())
    return Layout.of(_decided(recipe, streamed))


def _decided(recipe: Recipe, streamed: StreamedModel) -> dict[str, Scheme]:
    if isinstance(recipe, BitsAndBytesRecipe):
        from workers.engines import bitsandbytes

        converted = bitsandbytes.plan(streamed.model, recipe).converted
        modules = [w.module for w in streamed.weights if w.input.module in converted]
        return dict.fromkeys(modules, recipe.scheme)
    from workers.methods.schemes import schemes_of

    schemes = schemes_of(recipe, streamed)
    return {weight.module: schemes[weight.key] for weight in streamed.weights if weight.key in schemes}
