"""The preflight: what a machine has, and what a job lacks there. Facts apart from judgement; no torch at import."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

from workers.spec.base import Frozen
from workers.spec.engines import ENGINES
from workers.spec.formats import FORMATS
from workers.spec.recipes import Recipe
from workers.spec.runtimes import RUNTIMES, checking

# Distributions that every stage needs.
BASE_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "huggingface_hub", "greenlet", "accelerate")


class Device(Frozen):
    """A CUDA device, with its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    processors: int = 1


class MachineFacts(Frozen):
    """What a machine has, as found by ``probe``; bytes."""

    node: str
    python: str
    packages: dict[str, str]
    devices: tuple[Device, ...] = ()
    host_memory: int
    disk_free: int
    cpus: int


def probe(workspace: Path, with_devices: bool = True) -> MachineFacts:
    """Look at this machine. ``with_devices`` imports torch, which takes seconds."""
    return MachineFacts(
        node=platform.node(),
        python=platform.python_version(),
        packages={name: version for name in sorted(_named()) if (version := _version(name))},
        devices=_devices() if with_devices else (),
        host_memory=host_memory(),
        disk_free=shutil.disk_usage(_existing(workspace)).free,
        cpus=len(os.sched_getaffinity(0)),
    )


def answer(request: str) -> str:
    """``MachineFacts`` beside the workspace that is named, both as JSON: how a process of its own is asked."""
    return probe(Path(json.loads(request)["workspace"])).model_dump_json()


def versions() -> dict[str, str]:
    """Versions of all that shapes an artifact, for its manifest."""
    found = {name: version for name in sorted({*_named(), "quantmill"}) if (version := _version(name))}
    return {"python": platform.python_version(), "platform": platform.machine(), **found}


def problems(facts: MachineFacts, recipe: Recipe) -> list[str]:
    """All that the machine lacks for a recipe, each with the command that mends it. Pure."""
    engine, runtime = ENGINES[recipe.engine], checking(recipe.format)
    needed = [*BASE_PACKAGES, *engine.packages, *FORMATS[recipe.format].needs]
    lacking = [name for name in needed if name not in facts.packages]
    if runtime.environment is None:
        lacking += runtime.lacks(recipe.format, facts.packages)
    found = [
        f"package {name} is not installed, expected for recipe {recipe.name!r}; run "
        f"`pip install '{runtime.extras.get(name, name)}'`"
        for name in dict.fromkeys(lacking)
    ]
    return (
        found
        + [
            f"compute capability {'.'.join(map(str, device.capability))} of {device.name}: {engine.name} expects "
            f"{'.'.join(map(str, engine.least_capability))} or more; use the CPU"
            for device in facts.devices
            if device.capability < engine.least_capability
        ][:1]
    )


def _named() -> set[str]:
    """The distributions that any row names, and those that every stage needs."""
    made_with = {name for row in ENGINES.values() for name in row.packages}
    stored_with = {name for row in FORMATS.values() for name in row.needs}
    # Of a runtime in an environment of its own, this process can't tell.
    here = [row for row in RUNTIMES.values() if row.entry and row.environment is None]
    read_with = {name for row in here for names in row.packages.values() for name in (row.distribution, *names)}
    return {*BASE_PACKAGES, *made_with, *stored_with, *read_with}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def host_memory() -> int:
    """Bytes in all; a container's limit counts where it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _devices() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        return ()  # named among the missing packages

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Device(name=p.name, capability=(p.major, p.minor), memory=p.total_memory, processors=p.multi_processor_count)
        for p in properties
    )
