"""Where prebuilt environments lie on a machine, and which interpreter a recipe's stages run with. No torch, no Ray.

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

from pydantic import Field, ValidationError

from workers.errors import PreflightError
from workers.spec.base import SLUG, Frozen

RECORD = "quantmill-environment.json"


class Built(Frozen):
    """What an environment was built from: its definition, and what it has to share with the driver."""

    name: str
    identity: str = Field(description="sha256 of the definition and of all that follows.")
    definition: dict[str, Any]
    python: str
    packages: dict[str, str] = Field(description="Versions that are the driver's: ray, torch and quantmill.")
    created_at: str


def root() -> Path:
    """The folder of the environments: ``QUANTMILL_ENVS``, else ``quantmill/envs`` in the user's cache."""
    if chosen := os.environ.get("QUANTMILL_ENVS"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "quantmill" / "envs"


def folder(name: str) -> Path:
    """Where the environment of that name is expected.

    Raises:
        PreflightError: for a name that could lead out of the root.
    """
    if not re.match(SLUG, name):
        raise PreflightError(f"environment: got {name!r}, expected small letters, digits, '.', '_' and '-'; rename it")
    return root() / name


def interpreter(name: str) -> Path:
    """The Python of an environment, by which a stage is started; looked up on the machine that runs it.

    Ray itself tries a Python that doesn't start for six minutes before it gives up, so what can be known is asked here.

    Raises:
        PreflightError: it isn't built here, or has another Ray, Python or quantmill than this process.
    """
    place = folder(name)
    python = place / "bin" / "python"
    remedy = f"run `quantmill env create {name}` there"
    if not os.access(python, os.X_OK):
        raise PreflightError(f"environment {name!r} isn't built on {platform.node()}, expected {python}; {remedy}")
    record = built(name)
    if record is None:
        remedy = f"install that into {place}"
    had = (record.python, record.packages) if record else _ask(name, python)
    if found := _differences(*had):
        raise PreflightError(f"environment {name!r} on {platform.node()} has {', '.join(found)}; {remedy}")
    return python


def interpreters(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreters of those environments that can be used on this machine, and why the others can't; by name."""
    usable, problems = {}, {}
    for name in names:
        try:
            usable[name] = str(interpreter(name))
        except PreflightError as error:
            problems[name] = str(error)
    return usable, problems


def built(name: str) -> Built | None:
    """The record of an environment that ``quantmill env create`` made; None for one made by hand, or for none.

    Raises:
        PreflightError: the record isn't readable.
    """
    path = folder(name) / RECORD
    try:
        return Built.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise PreflightError(
            f"environment {name!r}: {path} isn't readable ({error}); run `quantmill env remove {name}`"
        ) from error


def _ask(name: str, python: Path) -> tuple[str, dict[str, str]]:
    """Version and packages of a Python without a record, as it says itself; a tenth of a second."""
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


def _differences(python: str, packages: dict[str, str]) -> list[str]:
    """In what an environment differs from this process where both must agree, in words."""
    here = platform.python_version()
    found = [] if minor(python) == minor(here) else [f"Python {python}, expected {minor(here)} as here"]
    for name in ("ray", "quantmill"):
        had, have = packages.get(name), version(name)
        # Code that was shipped with a Ray job stands before what is installed, there as here.
        if have is not None and had != have:
            found.append(f"{f'{name} {had}' if had else f'no {name}'}, expected {have} as here")
    return found


def minor(python: str) -> str:
    """``3.11`` of ``3.11.7``."""
    return ".".join(python.split(".")[:2])


def version(distribution: str) -> str | None:
    """The version that is installed beside this process, if it is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
