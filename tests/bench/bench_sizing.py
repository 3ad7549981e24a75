"""Estimates of peak host memory beside what stages took, each a child of a warm parent, as in a run.

python -m tests.bench.bench_sizing [--model FOLDER ...] [--recipes NAME ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.planning import sizing, sources
from pipeline.zoo.zoo import ModelEntry
from tests.bench import models
from workers.machine import child
from workers.machine.warm import Parent
from workers.run import run_stage
from workers.spec.job import Stage

RECIPES = ("gptq-w4-g128", "awq-w4-g128", "fp8-dynamic", "bnb-nf4")
SHAPES = (
    ("narrow and deep", {"layers": 24, "hidden": 512, "intermediate": 1408}),
    ("wide and shallow", {"layers": 4, "hidden": 2048, "intermediate": 5632}),
    ("a large vocabulary", {"layers": 4, "hidden": 1024, "intermediate": 2816, "vocabulary": 64000}),
)
ZOO = Path(__file__).parents[1] / "zoo" / "models"
GOAL = 1.5


def measured(request: str) -> str:
    """Run a stage; the peak bytes of its processes."""
    model, workspace, recipe, stage = json.loads(request)
    of = models.job(Path(model), Path(workspace), recipe, samples=16)
    result = run_stage(of, Stage(stage), recipe if stage == Stage.VERIFY else None)
    errors = [result.failure, *(made.error for made in result.artifacts)]
    assert not any(errors), errors
    return json.dumps(result.memory.host)


def peaks(model: Path, recipe: str, warm: str) -> Iterator[tuple[Stage, int]]:
    """Peak bytes of quantizing and of verifying."""
    with tempfile.TemporaryDirectory() as workspace:
        for stage in (Stage.QUANTIZE, Stage.VERIFY):
            request = json.dumps([str(model), workspace, recipe, stage.value])
            ended = child.run("tests.bench.bench_sizing:measured", request, warm=warm)
            assert ended.answer is not None, ended
            assert ended.note is None, ended.note
            yield stage, json.loads(ended.answer)


def compare(name: str, model: Path, recipes: list[str], warm: str) -> None:
    """Print a row for each recipe and stage."""
    source = sources.resolve(ModelEntry(id=str(model)), model.parent)
    for recipe in recipes:
        of = models.job(model, model, recipe, samples=16)
        needs = sizing.estimate(source, of.orders[0].recipe, of.calibration, of.verification)
        for stage, peak in peaks(model, recipe, warm):
            need = (needs.quantize if stage == Stage.QUANTIZE else needs.verify).host
            remark = "under" if need < peak else "" if need <= GOAL * peak else f"over {GOAL}"
            print(
                f"| {name} | {recipe} | {stage} | {need / 1e6:.0f} | {peak / 1e6:.0f} | {need / peak:.2f} | {remark} |"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, nargs="*", help="left out: random ones and the zoo's")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    arguments = parser.parse_args()
    print(models.machine())
    print("| model | recipe | stage | estimate, MB | peak, MB | ratio | |\n|---|---|---|---|---|---|---|")
    with Parent() as parent:
        for folder in arguments.model or [ZOO / "llama-tiny", ZOO / "qwen3-moe-tiny"]:
            compare(folder.name, folder, arguments.recipes, parent.address)
        for name, shape in () if arguments.model else SHAPES:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                models.save_llama(folder, **shape)
                compare(name, folder, arguments.recipes, parent.address)


if __name__ == "__main__":
    main()
