"""What the scripts that run in a peer's own environment share: a request in, an answer out, both JSON.

Imports nothing but the standard library, torch and safetensors: no peer's environment holds quantmill.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A model to quantize: ``tokens`` is a safetensors file with int64 ``tokens`` [samples, length]."""

    model: str
    tokens: str
    out: str
    threads: int
    settings: dict[str, Any]


@dataclass
class Answer:
    """What came of it: seconds by the name of what took them, versions, and the error if there was one."""

    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    error: str = ""
    traceback: str = ""

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time of the context under a name."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = time.perf_counter() - begun


def serve(quantize: Callable[[Request, Answer], None], *distributions: str) -> None:
    """Read the request that the command line names, quantize, and write the answer beside it."""
    begun = time.perf_counter()
    path = Path(sys.argv[1])
    request = Request(**json.loads(path.read_text()))
    answer = Answer(
        versions={name: importlib.metadata.version(name) for name in (*distributions, "torch", "transformers")},
        checkpoint=request.out,
    )
    try:
        import torch

        torch.set_num_threads(request.threads)
        torch.manual_seed(0)
        quantize(request, answer)
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"
        answer.traceback = traceback.format_exc()
    answer.seconds["process"] = time.perf_counter() - begun
    path.with_name("answer.json").write_text(json.dumps(asdict(answer), indent=2, default=str))


def rows(request: Request) -> Any:
    """The calibration tokens, int64 [samples, length]."""
    from safetensors.torch import load_file

    return load_file(request.tokens)["tokens"]
