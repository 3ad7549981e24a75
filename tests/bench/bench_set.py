"""Twelve recipes of a publisher's set from one pass, beside each of them alone: seconds.

python -m tests.bench.bench_set [--model llama-tiny] [--alone 3]

``--alone``: how many of the recipes that took longest in the shared pass are made alone, too. GGUF needs the
environment llama-cpp for its converter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.workers import jobs
from workers.quantize.one_pass import quantize

RECIPES = (
    "gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0", "gguf-q3_k_m", "mlx-w4-g64", "mlx-w8-g64", "nvfp4", "nvfp4-w4a4", "mxfp4",
    "fp8-dynamic", "gptq-w4-g128", "gptq-w8-g128",
)  # fmt: skip


def seconds(folder: Path, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Seconds of one pass that makes these recipes, and each artifact's own of them."""
    with tempfile.TemporaryDirectory() as scratch:
        job = jobs.job(folder, Path(scratch), *names, samples=128)
        start = time.perf_counter()
        made, _ = quantize(job, folder)
        whole = time.perf_counter() - start
    for artifact in made:
        assert artifact.error is None, artifact.error
    return whole, {artifact.recipe: artifact.seconds for artifact in made}


def main() -> None:
    """Print the seconds of the shared pass, and of those recipes alone that took longest in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--alone", type=int, default=3)
    given = parser.parse_args()
    folder = jobs.ZOO / "models" / given.model
    seconds(folder, RECIPES[-1:])  # imports
    together, own = seconds(folder, RECIPES)
    print(f"{len(RECIPES)} together: {together:.1f} s", flush=True)
    slowest = 0.0
    for name in sorted(own, key=own.__getitem__, reverse=True)[: given.alone]:
        alone, _ = seconds(folder, [name])
        slowest = max(slowest, alone)
        print(f"{name}: {alone:.1f} s alone, {own[name]:.1f} s of its own in the shared pass", flush=True)
    print(f"together / slowest alone: {together / slowest:.2f}")


if __name__ == "__main__":
    main()
