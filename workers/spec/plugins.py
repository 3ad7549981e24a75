"""What files and installed packages add without a change to quantmill: formats, runtimes, recipes, methods, gates and
notifiers.

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
from typing import TYPE_CHECKING, Any, NamedTuple

from workers.errors import PluginError

if TYPE_CHECKING:
    from workers.spec.formats import Format
    from workers.spec.runtimes import Runtime

GROUP, VARIABLE = "quantmill", "QUANTMILL_PLUGINS"


class AddedMethod(NamedTuple):
    """A method that a plugin adds: where its solver is (module:name), whether it needs statistics of a calibration
    text, and the number of its numerics, which a change of the bytes that it makes has to raise."""

    solver: str
    calibrated: bool
    numerics: int


# What was added besides rows, by name: where a format's codec, a gate or a notifier is (module:name), methods, and
# folders of recipe files.
CODECS: dict[str, str] = {}
METHODS: dict[str, AddedMethod] = {}
GATES: dict[str, str] = {}
NOTIFIERS: dict[str, str] = {}
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


def add_method(name: str, solver: str, *, calibrated: bool = False, numerics: int = 1) -> None:
    """Add a method that chooses codes on integer grids, for recipes with ``method: name``.

    ``solver`` names a function as ``module:name``, which only workers import: it's given the recipe, whose ``options``
    are the mapping of the zoo file, and a ``workers.methods.layer.Stack``, and returns a ``Solved`` of that module.

    Raises:
        ValueError: it's the name of one of quantmill's own.
    """
    from workers.spec.recipes import OWN_METHODS

    if name in OWN_METHODS:
        raise ValueError(f"add_method: {name!r} is a method of quantmill's own; choose another name")
    METHODS[name] = AddedMethod(solver, calibrated, numerics)


def add_gate(name: str, gate: str) -> None:
    """Add a gate, which judges every artifact beside the thresholds.

    ``gate`` names a function as ``module:name``, which only workers import: it's given a
    ``workers.verify.gates.Judged``, and returns sentences against the artifact, none if it has nothing against it. One
    that fails to judge accepts nothing.
    """
    GATES[name] = gate


def add_notifier(name: str, notifier: str) -> None:
    """Add a notifier, which is told how every run ended.

    ``notifier`` names a function as ``module:name``, which the driver imports once the run has ended: it's given what
    ``--webhook`` posts, as a dict. Whatever it raises, and silence for longer than
    ``pipeline.report.notify.NOTIFIER_SECONDS``, is said at the end of the run and changes nothing else.
    """
    NOTIFIERS[name] = notifier


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
