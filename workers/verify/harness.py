"""Tasks of lm-eval on a checkpoint and on its reference: ``answer`` is asked in a fresh process.

It runs with the library that users evaluate with (extra ``eval``); both models are loaded whole.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from workers.errors import PreflightError, ZooError
from workers.spec.base import Frozen


class HarnessRequest(Frozen):
    """Models by their folders, tasks by lm-eval's names, and where else tasks are defined."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    include: str | None = Field(None, description="A folder with YAML files of tasks.")
    limit: int | None = Field(None, description="Samples of each task.")
    trust_remote_code: bool = False


class Score(Frozen):
    """A metric of a task for each of the models, with its standard error where lm-eval has one."""

    task: str
    metric: str
    values: tuple[float, ...]
    errors: tuple[float | None, ...]


def evaluate(request: HarnessRequest) -> list[Score]:
    """Run the tasks on all models.

    Raises:
        PreflightError: lm-eval isn't installed.
        ZooError: a task that it doesn't know.
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
    found = []
    for task, metrics in results[0].items():
        for key, value in metrics.items():
            name, _, which = key.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            stderr = f"{name}_stderr,{which}"
            errors = [result[task].get(stderr) for result in results]
            found.append(
                Score(
                    task=task,
                    metric=name if which in ("", "none") else f"{name} ({which})",
                    values=tuple(float(result[task][key]) for result in results),
                    errors=tuple(error if isinstance(error, float) else None for error in errors),
                )
            )
    return found


def answer(request: str) -> str:
    """Scores for a ``HarnessRequest``, or the failure; JSON."""
    from workers.machine.failures import describe

    found: dict[str, Any] = {"scores": [], "failure": None}
    try:
        asked = HarnessRequest.model_validate_json(request)
        found["scores"] = [score.model_dump() for score in evaluate(asked)]
    except Exception as error:
        found["failure"] = describe(error).model_dump()
    return json.dumps(found)
