"""Quantize with quantmill: ``python -m tests.bench.peers.run_ours REQUEST``; seconds of the quantize stage alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from tests.bench.peers.runner import Answer, Request, rows, serve


def quantize(request: Request, answer: Answer) -> None:
    """``settings``: a recipe. The reference, which the peers don't make, is made before the clock starts."""
    from tests.bench import models
    from workers.model.text import CalibrationTokens
    from workers.quantize import inputs
    from workers.quantize import one_pass as stage
    from workers.spec.job import Job
    from workers.spec.recipes import Recipe
    from workers.spec.workspace import artifact_folder

    tokens = rows(request)
    inputs.calibration_tokens = lambda calibration, tokenizer: CalibrationTokens((tokens,))
    model, workspace = Path(request.model), Path(request.out)

    def run(of: Job) -> None:
        made, _ = stage.quantize(of, model)
        assert made[0].error is None, made[0].error

    run(models.job(model, workspace, "rtn-w4-g128" if "stories" not in model.name else "bnb-nf4"))
    adapter: TypeAdapter[Recipe] = TypeAdapter(Recipe)
    of = models.job(model, workspace, adapter.validate_python(request.settings))
    with answer.timed("quantize"):
        run(of)
    answer.checkpoint = str(artifact_folder(str(workspace), of.orders[0]))


if __name__ == "__main__":
    serve(quantize, "bitsandbytes")
