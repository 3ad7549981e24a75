"""A stand-in for a CUDA card: ``cuda:0`` with the CPU's kernels, built from card.cpp for this Python's torch.

It refuses what a card refuses (tensors of two devices in one operation, more memory than there is, a device number
that isn't there; also what another stream writes and nobody waited for) and counts what costs time on a card: kernel
launches, waits, bytes moved. It can't show speed, a card's own rounding, kernels that only CUDA has, or the caching
allocator's fragmentation. A process has it from its start or not at all: ``environment()`` is that of a process with
one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE, SITE = Path(__file__).with_name("card.cpp"), Path(__file__).with_name("site")
# Environment variables of a process with a card: the library, bytes of memory, number of cards, compute capability.
LIBRARY, MEMORY, CARDS, CAPABILITY = "TEST_CARD", "TEST_CARD_MEMORY", "TEST_CARDS", "TEST_CARD_CAPABILITY"
# Functions of ``torch.cuda`` that do nothing here.
IGNORED = (
    "init", "_lazy_init", "empty_cache", "synchronize", "manual_seed", "manual_seed_all", "reset_peak_memory_stats",
)  # fmt: skip
COUNTERS = ("launches", "waits", "to", "from", "aside", "event_waits", "unrecorded")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def build() -> Path:
    """The library for this Python's torch; built once for each torch and source (half a minute)."""
    import torch

    cxx, root = compiler(), Path(torch.__file__).parent
    assert cxx is not None
    name = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {root}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"quantmill-card-{os.getuid()}" / f"{name}.so"
    if library.is_file():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    link = [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
    command = [cxx, "-O1", "-shared", "-fPIC", "-std=c++20", "-w", *include, str(SOURCE), "-o", str(partial), *link]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} doesn't compile against torch {torch.__version__}: {done.stderr[-3000:]}")
    partial.rename(library)
    return library


def environment(
    memory: int = 80 << 30, cards: int = 1, capability: tuple[int, int] = (9, 0), **more: str
) -> dict[str, str]:
    """The environment of a process with cards; its children have them too."""
    root = Path(__file__).parents[2]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SITE), str(root)]),
        LIBRARY: str(build()),
        MEMORY: str(memory),
        CARDS: str(cards),
        CAPABILITY: ".".join(map(str, capability)),
        **more,
    }


@dataclass(frozen=True)
class Properties:
    """What ``torch.cuda.get_device_properties`` returns."""

    major: int
    minor: int
    total_memory: int
    name: str = "Stand-in for a card"
    multi_processor_count: int = 132
    warp_size: int = 32
    L2_cache_size: int = 50 << 20
    is_integrated: int = 0


@dataclass
class Counted:
    """What a piece of work took: kernel launches, waits, bytes to and from the card, and peak bytes of its memory.

    ``aside`` of the bytes to it came from pinned memory on another stream than the default; ``event_waits`` are a
    thread's waits for one event. ``unrecorded`` blocks were given back while another stream might use them. The peak is
    the first card's; ``by_card`` are each card's launches and peak.
    """

    launches: int = 0
    waits: int = 0
    to: int = 0
    from_: int = 0
    aside: int = 0
    event_waits: int = 0
    unrecorded: int = 0
    peak: int = 0
    by_card: tuple[tuple[int, int], ...] = ()


class Card:
    """The cards of this process."""

    def __init__(self, library: Any, count: int) -> None:
        self._library = library
        self._count = count

    @contextmanager
    def counted(self) -> Iterator[Counted]:
        """Count the work of a block; the result is filled at its end."""
        self._library.card_reset()
        found = Counted()
        try:
            yield found
        finally:
            for name in COUNTERS:
                setattr(found, name.replace("from", "from_"), self._call(name))
            found.peak = self._library.card_peak(0)
            found.by_card = tuple(
                (self._library.card_launches_on(card), self._library.card_peak(card)) for card in range(self._count)
            )

    def so_far(self) -> tuple[int, int]:
        """Launches and waits since counting began."""
        return self._call("launches"), self._call("waits")

    def _call(self, name: str) -> int:
        return int(getattr(self._library, f"card_{name}")())

    @property
    def held(self) -> int:
        """Bytes that tensors take now."""
        return int(self._library.card_held(0))

    def limit(self, memory: int) -> None:
        """Out of memory beyond so many bytes on any card; 0: never."""
        for card in range(self._count):
            self._library.card_limit(card, ctypes.c_int64(memory))

    def fail_after(self, launches: int, message: str) -> None:
        """Fail with this message after so many launches, and ever after, as a poisoned context does."""
        self._library.card_fails_after(ctypes.c_int64(launches), message.encode())


def install() -> Card | None:
    """Give this process the cards that its environment names; None if it names none, or hides them.

    bitsandbytes registers other operations where it finds a card, so it is imported before.
    """
    path = os.environ.get(LIBRARY)
    if path is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    # Before torch asks for the hooks of CUDA, which it does once.
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    import bitsandbytes  # noqa: F401
    import torch

    for name in (*COUNTERS, "held", "peak", "launches_on"):
        getattr(library, f"card_{name}").restype = ctypes.c_int64
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = len(visible.split(",")) if visible else int(os.environ[CARDS])
    memory = int(os.environ[MEMORY])
    major, minor = map(int, os.environ[CAPABILITY].split("."))
    library.card_count(cards)
    for index in range(cards):
        library.card_limit(index, ctypes.c_int64(memory))
    _describe(torch, library, cards, Properties(major, minor, memory))
    return Card(library, cards)


def _describe(torch: Any, library: Any, cards: int, properties: Properties) -> None:
    """Have ``torch.cuda`` and ``torch.accelerator`` tell of the cards."""

    def index(device: Any = None) -> int:
        found = device if device is None or isinstance(device, int) else torch.device(device).index
        return int(library.card_current()) if found is None else int(found)

    def held(device: Any = None) -> int:
        return int(library.card_held(index(device)))

    def peak(device: Any = None) -> int:
        return int(library.card_peak(index(device)))

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def limit(fraction: float, device: Any = None) -> None:
        library.card_limit(index(device), ctypes.c_int64(int(fraction * properties.total_memory)))

    told = {
        "set_per_process_memory_fraction": limit,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: cards,
        "current_device": index,
        "set_device": lambda device: library.card_use(index(device)),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "get_arch_list": lambda: [f"sm_{properties.major}{properties.minor}"],
        "mem_get_info": lambda device=None: (properties.total_memory - held(device), properties.total_memory),
        "memory_allocated": held,
        "memory_reserved": held,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        **dict.fromkeys(IGNORED, nothing),
    }
    for name, value in told.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.device_count = lambda: cards
    torch.accelerator.current_device_index = index
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")


def run(module: str, *arguments: str, seconds: float = 600, **of: Any) -> str:
    """The standard output of a module run as a script in a process with cards (``environment``).

    Raises:
        AssertionError: it failed; with the end of its standard error.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment(**of), capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
