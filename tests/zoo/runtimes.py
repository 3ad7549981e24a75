"""Load each recipe's artifact of each zoo model in each runtime, and write docs/runtimes.json and docs/runtimes.md.

python -m tests.zoo.runtimes [--runtime NAME] [--recipe NAME] [--model NAME] [--missing]     (make runtimes)

With --missing, what stands in docs/runtimes.json isn't measured again. Runtimes whose environment isn't built here are
left out, and what was written of them before is kept. Artifacts are made in haste: what is measured is how they load,
not how good they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipeline.planning import fitting, sources
from pipeline.zoo import gating, outcomes, shipped
from pipeline.zoo.outcomes import Outcome
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.machine import environments, preflight
from workers.quantize.one_pass import quantize
from workers.spec.job import Job, Thresholds, Verdict
from workers.spec.layers import kinds_of
from workers.spec.recipes import Recipe
from workers.spec.runtimes import RUNTIMES, Runtime, runtime_named
from workers.verify.stage import verify

MODELS = ("llama-tiny", "qwen3-moe-tiny", "gpt2-tiny")
# A recipe, a model and a runtime.
Key = tuple[str, str, str]


def measured(
    model: str, workspace: Path, runtimes: list[Runtime], recipes: list[Recipe], known: Collection[Key] = ()
) -> Iterator[Outcome]:
    """The outcomes of recipes in the runtimes that read their format, each once it's known, but for the ``known``.

    An artifact is made if the plan makes it for one of them.
    """
    folder = jobs.ZOO / "models" / model
    source = sources.resolve(ModelEntry(id=model), folder.parent)
    takers: dict[str, tuple[str, ...]] = {}
    for recipe in recipes:
        if _usable(preflight.environments_of(recipe)):
            takers[recipe.name] = tuple(
                runtime.name
                for runtime in runtimes
                if recipe.format in runtime.rules
                and (recipe.name, model, runtime.name) not in known
                and _usable([runtime.environment])
                and not list(fitting.recipe_problems(source, recipe, (runtime.name,)))
            )
    job = jobs.job(folder, workspace, *(jobs.quick(recipe) for recipe in recipes if takers.get(recipe.name)), samples=8)
    orders = tuple(
        order.model_copy(update={"runtimes": takers[order.recipe.name], "thresholds": _thresholds(order.recipe)})
        for order in job.orders
    )
    job = job.model_copy(update={"orders": orders})
    made = quantize(job, folder)[0] if orders else []
    failed = {artifact.recipe: artifact.error for artifact in made if artifact.error}
    for recipe in recipes:
        kinds = kinds_of(recipe, source.tensors, conv1d=source.family.conv1d, model_type=source.config["model_type"])
        for runtime in runtimes:
            if recipe.format not in runtime.rules or recipe.name in failed or not _usable([runtime.environment]):
                continue
            found = {"recipe": recipe.name, "model": model, "runtime": runtime.name}
            if tuple(found.values()) in known:
                continue
            if why := runtime.reads(recipe.format, recipe.scheme, kinds):
                yield Outcome(**found, verdict="refused", why=why)
            elif runtime.name in takers.get(recipe.name, ()):
                yield Outcome(**found, **_checked(job, recipe, runtime, folder))


def _thresholds(recipe: Recipe) -> Thresholds:
    """Loose ones, for the artifact is made in haste; the runtime's arithmetic is judged as everybody's is."""
    own = gating.thresholds(shipped.gates()["default"], (), recipe)
    return jobs.LOOSE.model_copy(update={"runtime_logit_difference": own.runtime_logit_difference})


def _usable(names: list[str] | list[str | None]) -> bool:
    return not environments.interpreters(name for name in names if name)[1]


def _checked(job: Job, recipe: Recipe, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """The fields of an outcome that come from loading an artifact in one runtime."""
    order = job.order(recipe.name).model_copy(update={"runtimes": (runtime.name,)})
    verdict = verify(job, order, folder).verdict
    return fields(verdict)


def fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict as fields of an outcome."""
    if verdict.runtime is None or not verdict.accepted:
        return {"verdict": "failed", "why": "; ".join(verdict.reasons)}
    found = verdict.runtime
    return {
        "verdict": found.verdict, "version": found.version, "processor": found.processor,
        "difference": float(f"{found.relative_logit_difference:.2g}"), "kl": float(f"{found.kl_mean:.2g}"),
    }  # fmt: skip


def main() -> None:
    """Measure all, or what is named."""
    options = argparse.ArgumentParser()
    options.add_argument("--runtime", action="append", type=runtime_named, help="Only in this runtime.")
    options.add_argument("--recipe", action="append", type=shipped.recipe, help="Only this recipe.")
    options.add_argument("--model", action="append", choices=MODELS, help="Only this model.")
    options.add_argument("--missing", action="store_true", help="Only what isn't known yet.")
    chosen = options.parse_args()
    runtimes = chosen.runtime or list(RUNTIMES.values())
    recipes = chosen.recipe or [shipped.recipe(name) for name in shipped.recipe_names()]
    known = {(o.recipe, o.model, o.runtime): o for o in outcomes.read()}
    for model in chosen.model or MODELS:
        with tempfile.TemporaryDirectory() as workspace:
            done = known.keys() if chosen.missing else ()
            for outcome in measured(model, Path(workspace), runtimes, recipes, tuple(done)):
                print(json.dumps(outcome.model_dump(exclude_defaults=True)), flush=True)
                known[outcome.recipe, outcome.model, outcome.runtime] = outcome
                outcomes.write(known.values())


if __name__ == "__main__":
    main()
