"""What the tests of fresh processes ask them: entries, JSON text to JSON text."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path


def echo(request: str) -> str:
    """The request, and what is to be seen of the process."""
    return json.dumps(
        {
            "request": json.loads(request),
            "pid": os.getpid(),
            "session": os.getsid(0),
            "environment": dict(os.environ),
            "cwd": str(Path.cwd()),
            "argv": sys.argv,
            "nice": os.nice(0),
            "threads": len(list(Path("/proc/self/task").iterdir())),
            "modules": sorted({"torch", "transformers", "numpy"} & set(sys.modules)),
            "descriptors": _descriptors(),
        }
    )


def _descriptors() -> list[str]:
    """What this process has open, but for the listing itself."""
    found = Path("/proc/self/fd")
    return sorted(str(path.readlink()) for path in found.iterdir() if path.is_symlink())


def mark(request: str) -> str:
    """How often this process was marked before: more than once only if it isn't fresh."""
    here = sys.modules[__name__]
    seen = vars(here).get("seen", 0)
    vars(here)["seen"] = seen + 1
    os.environ["SEEN"] = "1"
    return json.dumps([seen, random.random()])


def compute(request: str) -> str:
    """Torch at work on several threads, and random numbers as a new process draws them."""
    import numpy
    import torch

    first = torch.rand(1).item()
    a = torch.ones(700, 700)
    total = (a @ a).max().item()
    return json.dumps(
        [total, torch.get_num_threads(), len(list(Path("/proc/self/task").iterdir())), first, numpy.random.rand()]
    )


def hold(request: str) -> str:
    """Take so many bytes, and end."""
    held = bytearray(int(request))
    held[::4096] = b"x" * len(held[::4096])
    return json.dumps(len(held))


def fail(request: str) -> str:
    """End as it's asked to."""
    match json.loads(request):
        case "raise":
            raise ValueError("as asked")
        case "exit":
            sys.exit(7)
        case "memory":
            raise MemoryError("too much")
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def hang(request: str) -> str:
    """Start a process of its own, tell both numbers in the file that is asked for, and wait for long."""
    helper = subprocess.Popen(["sleep", "600"])
    partial = Path(json.loads(request) + ".new")
    partial.write_text(f"{os.getpid()} {helper.pid}")
    partial.rename(json.loads(request))
    time.sleep(600)
    return ""


def nested(request: str) -> str:
    """What a child of this process says."""
    from workers.machine import child

    ended = child.run(f"{__name__}:echo", json.dumps("from within"))
    assert ended.note is None, ended.note
    return ended.answer or json.dumps(ended.stderr)
