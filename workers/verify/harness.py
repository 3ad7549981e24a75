"""Runs tasks of lm-eval on a checkpoint and on its reference; ``answer`` is called in a fresh process.

It needs the library that users evaluate with (extra ``eval``); both models are loaded in full.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from workers.errors import PreflightError, ZooError
from workers.spec.base import Frozen


class HarnessRequest(Frozen):
    """Model folders, lm-eval task names, and a folder of further task definitions."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    include: str | None = Field(None, description="A folder with YAML files of tasks.")
    limit: int | None = Field(None, description="Samples of each task.")
    trust_remote_code: bool = False


class Score(Frozen):
    """One metric of a task for each model, with its standard error if lm-eval computes one."""

    task: str
    metric: str
    values: tuple[float, ...]
    errors: tuple[float | None, ...]


def evaluate(request: HarnessRequest) -> list[Score]:
    """Run the tasks on all models.

    Raises:
        PreflightError: lm-eval isn't installed.
        ZooError: lm-eval doesn't know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PreflightError(f"--task: lm-eval isn't installed ({error}); pip install 'quantmill[eval]'") from error
    import torch

    manager = TaskManager(include_path=request.include)
    unknown = [task for task in request.tasks if task not in manager.all_tasks]
    if unknown:
        raise ZooError(f"--task: lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, or give --tasks")
    results = [
        simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "trust_remote_code": request.trust_remote_code},
            tasks=list(request.tasks),
            task_manager=manager,
            limit=request.limit,
            batch_size=1,
            device="cuda" if torch.cuda.is_available() else "cpu",
            bootstrap_iters=1000,
            log_samples=False,
        )["results"]
        for folder in request.models
    ]
    return list(_scores(results))


def _scores(results: list[dict[str, dict[str, Any]]]) -> list[Score]:
    scores = []
    for task, metrics in results[0].items():
        for key, value in metrics.items():
            name, _, which = key.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            stderr = f"{name}_stderr,{which}"
            errors = [result[task].get(stderr) for result in results]
            scores.append(
                Score(
                    task=task,
                    metric=name if which in ("", "none") else f"{name} ({which})",
                    values=tuple(float(result[task][key]) for result in results),
                    errors=tuple(error if isinstance(error, float) else None for error in errors),
                )
            )
    return scores


def answer(request: str) -> str:
    """Scores of a ``HarnessRequest``, or the failure, as JSON."""
    from workers.machine.failures import describe

    reply: dict[str, Any] = {"scores": [], "failure": None}
    try:
        parsed = HarnessRequest.model_validate_json(request)
        reply["scores"] = [score.model_dump() for score in evaluate(parsed)]
    except Exception as error:
        reply["failure"] = describe(error).model_dump()
    return json.dumps(reply)
