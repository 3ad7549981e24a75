"""The table of the engines that take part in the pass: their makers, and the layouts of existing artifacts.

All names are engines of ``spec.engines`` without a script; engines with a script are called by ``engines.whole``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workers.engines.maker import Maker
from workers.model.loading import StreamedModel
from workers.spec import engines
from workers.spec.layers import Layout
from workers.spec.recipes import BitsAndBytesRecipe, GgufRecipe, KeepRecipe, LibraryRecipe, Recipe, TransformersRecipe
from workers.spec.schemes import Scheme
from workers.spec.workspace import layout_path


def _linear() -> type[Maker]:
    from workers.engines.linear import LinearMaker

    return LinearMaker


def _bitsandbytes() -> type[Maker]:
    from workers.engines.bitsandbytes import BitsAndBytesMaker  # importing the library takes seconds

    return BitsAndBytesMaker


def _ggml() -> type[Maker]:
    from workers.engines.ggml import GgmlMaker

    return GgmlMaker


def _keep(recipe: Recipe) -> type[Maker]:
    from workers.engines.keep import maker_of

    return maker_of(recipe)


MAKERS: dict[str, Callable[[Recipe], type[Maker]]] = {
    engines.LINEAR.name: lambda recipe: _linear(),
    engines.BITSANDBYTES.name: lambda recipe: _bitsandbytes(),
    engines.GGML.name: lambda recipe: _ggml(),
    engines.KEEP.name: _keep,
}


def maker_class(recipe: Recipe) -> type[Maker]:
    """The maker for a recipe; its library is imported only when a recipe needs it."""
    return MAKERS[recipe.engine](recipe)


def layout_of(folder: Path, recipe: Recipe, streamed: StreamedModel) -> Layout:
    """The layout of the artifact in ``folder``; recomputed for artifacts of releases that stored none."""
    layout_file = layout_path(folder)
    if layout_file.is_file():
        return Layout.model_validate_json(layout_file.read_text())
    return Layout.of(_layout_again(recipe, streamed))


def _layout_again(recipe: Recipe, streamed: StreamedModel) -> dict[str, Scheme]:
    if isinstance(recipe, BitsAndBytesRecipe):
        from workers.engines import bitsandbytes

        converted = bitsandbytes.plan(streamed, recipe).converted
        modules = [w.module for w in streamed.weights if w.input.module in converted]
        return dict.fromkeys(modules, recipe.scheme)
    from workers.methods.schemes import schemes_of

    own = GgufRecipe | KeepRecipe | TransformersRecipe | LibraryRecipe
    assert not isinstance(recipe, own), "its maker always stored a layout"
    schemes = schemes_of(recipe, streamed)
    return {weight.module: schemes[weight.key] for weight in streamed.weights if weight.key in schemes}
