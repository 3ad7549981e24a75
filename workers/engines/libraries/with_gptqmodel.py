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
    tokens = speak.tokens_of(request)
    data = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in tokens] or None
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as saved:
        speak.layers(model.model)
        model.quantize(data, batch_size=1)
        speak.progress("saving")
        model.save(saved)
        speak.declare(Path(saved), speak.gptq_exceptions(request))
        speak.store(request, Path(saved))
    return []


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the library's QuantizeConfig."""
    recipe = request["recipe"]
    scheme, options = recipe["scheme"], recipe["options"]
    return {
        "bits": scheme["bits"],
        "group_size": scheme["group_size"] or -1,
        "sym": scheme["symmetric"],
        "desc_act": options["activation_order"],
        "damp_percent": options["damping"],
        # Otherwise modules that little text reaches are rounded to nearest, without a word.
        "fallback": None,
        "offload_to_disk": False,
        # A name that begins with -: is left as it is.
        "dynamic": {f"-:{name}": {} for name in speak.exactly(request["left"])},
    }


if __name__ == "__main__":
    speak.main(make)
