"""Paths of prebuilt environments on a machine, and the interpreter of a recipe's stages. No torch, no Ray.

ROOT/NAME               a link to the version in use, or a virtual environment that somebody made by hand
ROOT/.built/NAME/HASH   one version: a virtual environment with ``quantmill-environment.json``, written last
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from workers.errors import PreflightError
from workers.spec.base import SLUG, Frozen

RECORD = "quantmill-environment.json"
# Distributions that an environment must have in this process's version.
SHARED, SHARED_WITHOUT_STAGES = ("ray", "quantmill"), ("quantmill",)


class Built(Frozen):
    """Record of an environment: its definition, and the versions that it must share with the driver."""

    name: str
    identity: str = Field(description="sha256 of the definition and of all that follows.")
    definition: dict[str, Any]
    python: str
    packages: dict[str, str] = Field(
        description="Versions that are the driver's: ray, torch and quantmill; without stages, quantmill alone."
    )
    created_at: str

    @property
    def stages(self) -> bool:
        """Whether stages can run there; without, only a runtime's check."""
        return bool(self.definition.get("stages", True))


def root() -> Path:
    """Root folder of the environments: ``QUANTMILL_ENVS``, or ``quantmill/envs`` in the user's cache."""
    if chosen := os.environ.get("QUANTMILL_ENVS"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "quantmill" / "envs"


def folder(name: str) -> Path:
    """Expected folder of the environment of that name.

    Raises:
        PreflightError: the name could lead out of the root.
    """
    if not re.match(SLUG, name):
        raise PreflightError(f"environment: got {name!r}, expected small letters, digits, '.', '_' and '-'; rename it")
    return root() / name


def interpreter(name: str) -> Path:
    """The Python of an environment that stages are started with; looked up on the machine that runs them.

    Ray retries a Python that doesn't start for six minutes before it gives up, so known problems are checked here.

    Raises:
        PreflightError: it isn't built here, or its Ray, Python or quantmill differs from this process's.
    """
    environment = folder(name)
    python = environment / "bin" / "python"
    remedy = f"run `quantmill env create {name}` there"
    if not os.access(python, os.X_OK):
        raise PreflightError(f"environment {name!r} isn't built on {platform.node()}, expected {python}; {remedy}")
    record = built(name)
    if record is None:
        remedy = f"install that into {environment}"
    python_and_packages = (record.python, record.packages) if record else _ask(name, python)
    shared = SHARED if record is None or record.stages else SHARED_WITHOUT_STAGES
    if differences := _differences(*python_and_packages, shared):
        raise PreflightError(f"environment {name!r} on {platform.node()} has {', '.join(differences)}; {remedy}")
    return python


def interpreters(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Interpreters of the usable environments on this machine, and the problems of the others; by name."""
    usable, problems = {}, {}
    for name in names:
        try:
            usable[name] = str(interpreter(name))
        except PreflightError as error:
            problems[name] = str(error)
    return usable, problems


def runs_stages(name: str) -> bool:
    """Whether stages can run in an environment, or only a runtime's check."""
    record = built(name)
    return record is None or record.stages


def built(name: str) -> Built | None:
    """The record of an environment made by ``quantmill env create``; None for a manual one, or if there is none.

    Raises:
        PreflightError: the record isn't readable.
    """
    path = folder(name) / RECORD
    try:
        return Built.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"environment {name!r}: {path} isn't readable ({error}); run `quantmill env remove {name}`"
        ) from error


def _ask(name: str, python: Path) -> tuple[str, dict[str, str]]:
    """Version and packages of a Python without a record, from running it, which takes a tenth of a second."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "packages = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps([platform.python_version(), packages]))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        version, packages = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PreflightError(f"environment {name!r}: {python} doesn't run ({error}); make it anew") from error
    return version, packages


def _differences(python: str, packages: dict[str, str], shared: Iterable[str]) -> list[str]:
    """Differences between an environment and this process that must agree, in words."""
    own_python = platform.python_version()
    differences = (
        [] if minor(python) == minor(own_python) else [f"Python {python}, expected {minor(own_python)} as here"]
    )
    for name in shared:
        their_version, own_version = packages.get(name), version(name)
        # Code shipped with a Ray job takes precedence over installed code, both there and here.
        if own_version is not None and their_version != own_version:
            differences.append(
                f"{f'{name} {their_version}' if their_version else f'no {name}'}, expected {own_version} as here"
            )
    return differences


def minor(python: str) -> str:
    """``3.11`` of ``3.11.7``."""
    return ".".join(python.split(".")[:2])


def version(distribution: str) -> str | None:
    """The version installed for this process; None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
