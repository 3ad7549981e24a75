"""Eight recipes of one model in one pass, against each of them alone, in one process.

python -m tests.bench.bench_pass [--layers N --hidden N --intermediate N] [--samples N]
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tests.bench import models
from workers.quantize.one_pass import quantize

RECIPES = (
    "gptq-w4-g128",
    "gptq-w3-g128",
    "gptq-w8-g128",
    "awq-w4-g128",
    "awq-w4-g128-gemm",
    "w8a8-int8",
    "fp8-static",
    "bnb-nf4",
)


def timed(model: Path, workspace: Path, samples: int, *recipes: str) -> tuple[float, dict[str, float]]:
    """Wall seconds of a pass whose reference is there already, and each artifact's own."""
    for folder in ("artifacts", "passes"):
        shutil.rmtree(workspace / folder, ignore_errors=True)
    gc.collect()
    begun = time.perf_counter()
    made, _ = quantize(models.job(model, workspace, *recipes, samples=samples), model)
    seconds = time.perf_counter() - begun
    failed = [f"{artifact.recipe}: {artifact.error.message}" for artifact in made if artifact.error]
    if failed:
        raise SystemExit(f"bench_pass: {failed}")
    return seconds, {artifact.recipe: artifact.seconds for artifact in made}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{models.machine()}, {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as scratch:
        model, workspace = Path(scratch) / "model", Path(scratch) / "work"
        size = models.save_llama(
            model, layers=arguments.layers, hidden=arguments.hidden, intermediate=arguments.intermediate
        )
        print(f"{arguments.layers} layers of {arguments.hidden} x {arguments.intermediate}, {size / 1e6:.0f} MB")
        timed(model, workspace, 1, "bnb-nf4")  # the reference, and every import
        together, own = timed(model, workspace, arguments.samples, *RECIPES)
        alone = {name: timed(model, workspace, arguments.samples, name)[0] for name in RECIPES}
        for name in RECIPES:
            print(f"  {name:<18} alone {alone[name]:7.2f} s, its own share of the pass {own[name]:7.2f} s")
        slowest = max(alone.values())
        print(f"  all eight together {together:.2f} s, the slowest alone {slowest:.2f} s: {together / slowest:.2f} x")
        print(f"  one after the other {sum(alone.values()):.2f} s: {sum(alone.values()) / together:.2f} x as long")


if __name__ == "__main__":
    main()
