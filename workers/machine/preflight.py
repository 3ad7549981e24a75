"""The preflight: probes a machine, and lists what a job lacks there. Facts apart from judgement; no torch at import."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version
from pydantic import Field

from workers.machine.memory import host_memory as host_memory
from workers.spec.base import Frozen
from workers.spec.cards import BFLOAT16, FLOAT8
from workers.spec.engines import ENGINES
from workers.spec.formats import FORMATS
from workers.spec.recipes import BitsAndBytesRecipe, Recipe
from workers.spec.runtimes import RUNTIMES, checkers
from workers.spec.schemes import Float8Scheme, TransformersScheme

# Distributions that every stage needs.
BASE_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "huggingface_hub", "greenlet", "accelerate")

# Versions that pyproject.toml asks for, which somebody may have changed since.
LEAST_VERSIONS = {"accelerate": "1.15", "bitsandbytes": "0.50.2", "transformers": "5.23", "torch": "2.9"}
# As torch.cuda.get_arch_list names them.
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


class Device(Frozen):
    """A CUDA device, with its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    processors: int = 1


class MachineFacts(Frozen):
    """A machine's resources, as measured by ``probe``; memory and disk in bytes."""

    node: str
    python: str
    packages: dict[str, str]
    devices: tuple[Device, ...] = ()
    host_memory: int
    disk_free: int
    cpus: int
    cards: int = Field(0, description="NVIDIA cards that the system shows, whether torch can use them or not.")
    torch_cuda: str | None = Field(None, description="The CUDA version that torch is built for; null: it isn't.")
    torch_architectures: tuple[str, ...] = Field((), description="Architectures that torch has kernels for: sm_90 ...")
    bitsandbytes_cuda: tuple[str, ...] = Field((), description="CUDA versions that bitsandbytes has libraries for.")
    refused: dict[str, str] = Field(default_factory=dict, description="Why recipes can't be made here, by their names.")


def probe(workspace: Path, with_devices: bool = True) -> MachineFacts:
    """Measure this machine. ``with_devices`` imports torch, which takes seconds."""
    return MachineFacts(
        node=platform.node(),
        python=platform.python_version(),
        packages={name: version for name in sorted(_named()) if (version := _version(name))},
        devices=_devices() if with_devices else (),
        host_memory=host_memory(),
        disk_free=shutil.disk_usage(_existing(workspace)).free,
        cpus=len(os.sched_getaffinity(0)),
        cards=_cards() if with_devices else 0,
        torch_cuda=_torch_cuda(),
        torch_architectures=_architectures() if with_devices else (),
        bitsandbytes_cuda=_bitsandbytes_cuda(),
    )


def answer(request: str) -> str:
    """``MachineFacts`` for the workspace named in the request, both as JSON: the entry of a separate process."""
    return probe(Path(json.loads(request)["workspace"])).model_dump_json()


def versions() -> dict[str, str]:
    """Versions of everything that affects an artifact, for its manifest."""
    installed = {name: version for name in sorted({*_named(), "quantmill"}) if (version := _version(name))}
    return {"python": platform.python_version(), "platform": platform.machine(), **installed}


def environments_of(recipe: Recipe, runtimes: Iterable[str] = ()) -> list[str]:
    """The prebuilt environments that a recipe needs: its own, its engine's, and those of the runtimes that check it."""
    read_in = [row.environment for row in checkers(recipe.format, runtimes)]
    names = (recipe.environment, ENGINES[recipe.engine].environment, *read_in)
    return [name for name in dict.fromkeys(names) if name is not None]


def problems(facts: MachineFacts, recipe: Recipe, runtimes: Iterable[str] = ()) -> list[str]:
    """Everything that the machine lacks for a recipe, each with the command that fixes it. Pure."""
    engine = ENGINES[recipe.engine]
    in_process = () if engine.environment else engine.packages
    in_recipe = recipe.scheme.packages if isinstance(recipe.scheme, TransformersScheme) else ()
    needed = [*BASE_PACKAGES, *in_process, *FORMATS[recipe.format].needs, *in_recipe]
    lacking = [name for name in needed if name not in facts.packages]
    in_process_runtimes = [row for row in checkers(recipe.format, runtimes) if row.environment is None]
    lacking += [name for row in in_process_runtimes for name in row.lacks(recipe.format, facts.packages)]
    extras = {name: extra for row in in_process_runtimes for name, extra in row.extras.items()}
    missing = [
        f"package {name} is not installed, expected for recipe {recipe.name!r}; run "
        f"`pip install '{extras.get(name, name)}'`"
        for name in dict.fromkeys(lacking)
    ]
    refused = [facts.refused[recipe.name]] if recipe.name in facts.refused and not missing else []
    return (
        missing
        + _too_old(facts)
        + _without_cuda(facts)
        + _without_kernels(facts)
        + _unfit_for_cards(facts, recipe)
        + refused
        + [
            f"compute capability {'.'.join(map(str, device.capability))} of {device.name}: {engine.name} expects "
            f"{'.'.join(map(str, engine.least_capability))} or more; use the CPU"
            for device in facts.devices
            if device.capability < engine.least_capability
        ][:1]
    )


def _too_old(facts: MachineFacts) -> list[str]:
    """Packages that are there, but older than what quantmill is tested with."""
    return [
        f"package {name} is too old, got {facts.packages[name]}, expected {least} or later; run "
        f"`pip install -U '{name}>={least}'`"
        for name, least in LEAST_VERSIONS.items()
        if name in facts.packages and Version(facts.packages[name]) < Version(least)
    ]


def _without_cuda(facts: MachineFacts) -> list[str]:
    """Cards that torch can't use."""
    if not facts.cards or facts.devices or "torch" not in facts.packages:
        return []
    if facts.torch_cuda is None:
        return [
            f"{facts.cards} NVIDIA card(s) on {facts.node}, but torch {facts.packages['torch']} is built without CUDA; "
            "run `pip install -U torch --index-url https://download.pytorch.org/whl/cu128`, or hide the cards from "
            "quantmill by CUDA_VISIBLE_DEVICES= to use the CPU"
        ]
    return [
        f"{facts.cards} NVIDIA card(s) on {facts.node}, but torch built for CUDA {facts.torch_cuda} finds none; update "
        "the driver (nvidia-smi shows the CUDA version that it reaches), or look at CUDA_VISIBLE_DEVICES"
    ]


def _without_kernels(facts: MachineFacts) -> list[str]:
    """Cards whose architecture this build of torch has no kernels for."""
    return [
        f"{device.name} has compute capability {'.'.join(map(str, device.capability))}, and torch "
        f"{facts.packages.get('torch')} has kernels for {', '.join(facts.torch_architectures)}; install a build "
        "of torch for this card (pytorch.org/get-started), or hide it by CUDA_VISIBLE_DEVICES= to use the CPU"
        for device in facts.devices
        if facts.torch_architectures and not has_kernels(facts.torch_architectures, device.capability)
    ][:1]


def has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures runs on a card of that compute capability.

    ``sm_86`` runs on 8.6 and later minor versions of 8; ``sm_90a`` on 9.0 alone; ``sm_100f`` as sm_100; PTX
    (``compute_80``) is compiled by the driver for every later card. Names that aren't known forbid nothing.
    """
    known = [found for name in architectures if (found := ARCHITECTURE.fullmatch(name))]
    if not known:
        return True
    for kind, major, minor, exact in (found.groups() for found in known):
        built = int(major), int(minor)
        if kind == "compute" and built <= capability:
            return True
        if (
            kind == "sm"
            and built[0] == capability[0]
            and (built == capability or (exact != "a" and built <= capability))
        ):
            return True
    return False


def _unfit_for_cards(facts: MachineFacts, recipe: Recipe) -> list[str]:
    """What a recipe's options ask of the cards that they can't do."""
    if not isinstance(recipe, BitsAndBytesRecipe) or not facts.devices:
        return []
    found, cuda = [], (facts.torch_cuda or "").partition(".")[0]
    if facts.bitsandbytes_cuda and cuda and not any(one.partition(".")[0] == cuda for one in facts.bitsandbytes_cuda):
        found.append(
            f"bitsandbytes {facts.packages.get('bitsandbytes')} has libraries for CUDA "
            f"{', '.join(facts.bitsandbytes_cuda)}, expected {facts.torch_cuda}, torch's; run `pip install -U "
            "bitsandbytes`"
        )
    old = next((device for device in facts.devices if device.capability < BFLOAT16), None)
    if recipe.options.compute_dtype == "bfloat16" and old is not None:
        found.append(
            f"options.compute_dtype: got 'bfloat16', and {old.name} has compute capability "
            f"{'.'.join(map(str, old.capability))}, expected 8.0 or more (Ampere) for recipe {recipe.name!r}; set "
            "float16"
        )
    return found


def notes(facts: MachineFacts, recipe: Recipe) -> list[str]:
    """What works on the machine's cards otherwise than on newer ones. Pure."""
    if not isinstance(recipe.scheme, Float8Scheme):
        return []
    return [
        f"{device.name} has no FP8 kernels (capability {'.'.join(map(str, device.capability))}, expected 8.9 or "
        "more): runtimes decode the weights there"
        for device in facts.devices
        if device.capability < FLOAT8
    ][:1]


def _cards() -> int:
    """Cards that the system shows, unless CUDA_VISIBLE_DEVICES hides all of them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "none", "None")
    return 0 if hidden else len(list(Path("/dev").glob("nvidia[0-9]*")))


def _architectures() -> tuple[str, ...]:
    """What torch has kernels for; nothing, if it finds no card."""
    try:
        import torch
    except ImportError:
        return ()
    return tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else ()


def _torch_cuda() -> str | None:
    """The CUDA version of the installed torch, without importing it."""
    try:
        text = str(importlib.metadata.distribution("torch").locate_file("torch/version.py"))
        found = re.search(r"^cuda: .*= '([\d.]+)'", Path(text).read_text(), re.M)
    except (OSError, importlib.metadata.PackageNotFoundError):
        return None
    return found[1] if found else None


def _bitsandbytes_cuda() -> tuple[str, ...]:
    """CUDA versions in the names of bitsandbytes' libraries, as in libbitsandbytes_cuda128.so."""
    try:
        folder = Path(str(importlib.metadata.distribution("bitsandbytes").locate_file("bitsandbytes")))
    except importlib.metadata.PackageNotFoundError:
        return ()
    names = (re.fullmatch(r"libbitsandbytes_cuda(\d+)(\d)\.so", path.name) for path in folder.glob("*.so"))
    return tuple(sorted(f"{found[1]}.{found[2]}" for found in names if found))


def _named() -> set[str]:
    """All distributions named in the tables, and those that every stage needs."""
    in_this = [row for row in ENGINES.values() if row.environment is None]
    made_with = {name for row in in_this for name in (*row.packages, *row.optional)}
    stored_with = {name for row in FORMATS.values() for name in row.needs}
    # Packages of an engine or a runtime in its own environment can't be seen from this process.
    in_process = [row for row in RUNTIMES.values() if row.entry and row.environment is None]
    read_with = {name for row in in_process for names in row.packages.values() for name in (row.distribution, *names)}
    return {*BASE_PACKAGES, *made_with, *stored_with, *read_with}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_host_bytes() -> int:
    """Bytes that new processes can take: what the kernel estimates to be free, within ``host_memory``."""
    info = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.is_file() else None
    return min(host_memory(), 1024 * int(match.group(1))) if match else host_memory()


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
