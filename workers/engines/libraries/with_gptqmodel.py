"""gptqmodel's GPTQ, into the format gptq (first version)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from workers.engines.libraries import speak


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by gptqmodel, and leave its codes in the request's folder."""
    # The library starts a worker for each processor but one, and can't be imported where that is none.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    speak.progress("loading")
    model = GPTQModel.load(
        request["source"],
        QuantizeConfig(**settings(request)),
        backend=BACKEND.AUTO,
        trust_remote_code=request["trust_remote_code"],
    )
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as saved:
        speak.layers(model.model)
        model.quantize(speak.gptq_rows(request) or None, batch_size=1)
        speak.progress("saving")
        model.save(saved)
        speak.declare(Path(saved), speak.gptq_exceptions(request))
        speak.store(request, Path(saved))
    return []


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the library's QuantizeConfig."""
    return {
        **speak.gptq_settings(request),
        # Otherwise modules that little text reaches are rounded to nearest, without a word.
        "fallback": None,
        "offload_to_disk": False,
        # A name that begins with -: is left as it is.
        "dynamic": {f"-:{name}": {} for name in speak.exactly(request["left"])},
    }


if __name__ == "__main__":
    speak.main(make)
