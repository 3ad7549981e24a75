"""Quantizes a mixture of many experts in a process of its own, as a run's worker does; imports no test."""

from __future__ import annotations

import json
from pathlib import Path

from tests.workers.jobs import job, quick, recipe
from workers.run import run_stage
from workers.spec.job import Stage

RECIPE = quick(recipe(name="gptq-w4-g64", method="gptq", scheme={"bits": 4, "group_size": 64}))
SAMPLES = 16


def quantized(request: str) -> str:
    """Quantize a model; the peak bytes of the process, and what isn't as the recipe says."""
    model, workspace = json.loads(request)
    result = run_stage(job(Path(model), Path(workspace), RECIPE, samples=SAMPLES), Stage.QUANTIZE)
    (made,) = result.artifacts
    assert made.error is None, made.error
    return json.dumps([result.memory.host, made.fallbacks])
