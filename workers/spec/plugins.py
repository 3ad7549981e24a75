"""Rows that files and installed packages add: formats, runtimes and recipes, without a change to quantmill.

A plugin is a Python module that calls the functions below when it's imported. Installed packages name theirs as an
entry point of the group ``quantmill``; others are named by ``plugins:`` in a zoo, or in the environment variable
QUANTMILL_PLUGINS (paths of files or names of modules, separated as in PATH), which all processes of a run inherit.
Standard library only: every process of quantmill's imports this first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import PluginError

if TYPE_CHECKING:
    from workers.spec.formats import Format
    from workers.spec.runtimes import Runtime

GROUP, VARIABLE = "quantmill", "QUANTMILL_PLUGINS"
# What was added besides rows: where a format's codec is (module:name), and folders of recipe files.
CODECS: dict[str, str] = {}
RECIPES: list[Path] = []
_loaded: set[str] = set()


def add_format(row: Format, codec: str) -> None:
    """Add a format: its row, and where its codec is, as ``module:name``, which only workers import."""
    from workers.spec.formats import FORMATS

    FORMATS[row.name] = row
    CODECS[row.name] = codec


def add_runtime(row: Runtime) -> None:
    """Add a runtime."""
    from workers.spec.runtimes import RUNTIMES

    RUNTIMES[row.name] = row


def add_recipes(folder: Path) -> None:
    """Add the recipe files of a folder (NAME.yaml, as those of configs/recipes)."""
    if folder not in RECIPES:
        RECIPES.append(folder)


def load(names: Iterable[str] = ()) -> None:
    """Import the plugins of installed packages, of the environment variable, and ``names``; each once.

    Raises:
        PluginError: one can't be imported.
    """
    for point in entry_points(group=GROUP):
        _load(point.value)
    for name in (*os.environ.get(VARIABLE, "").split(os.pathsep), *names):
        if name:
            _load(name)


def bequeath(names: Iterable[str]) -> None:
    """Let the processes that this one starts load these plugins, too."""
    known = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, *names]))


def resolved(where: str) -> Any:
    """The object that ``module:name`` names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def _load(name: str) -> None:
    if name in _loaded:
        return
    _loaded.add(name)
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            importlib.import_module(name)
    except Exception as error:  # a plugin raises whatever it likes
        _loaded.discard(name)
        said = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(f"plugins: {name!r} can't be imported ({said}); mend it, or leave it out") from error


def _import_file(path: Path) -> None:
    """Import a file under its own name, so that what it names as ``stem:...`` is found."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file, looked at {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
