"""Peak host memory of quantizing a model of 48 layers, against the same with 12: each in a process of its own.

python -m tests.bench.bench_memory [--depths 12 48] [--recipes NAME ...]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench import models

RECIPES = ("gptq-w4-g128", "awq-w4-g128", "fp8-static", "bnb-nf4")


def measure(model: Path, workspace: Path, recipes: list[str]) -> None:
    """Quantize, and print the peak resident bytes after the imports and at the end."""
    from workers.quantize.one_pass import quantize

    of = models.job(model, workspace, *recipes, samples=16)
    before = peak_bytes()
    made, _ = quantize(of, model)
    assert not any(artifact.error for artifact in made), made
    print(json.dumps({"imports": before, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """The peak of this program (Linux); getrusage's is also that of the one that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("MODEL", "WORKSPACE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.recipes)
        return
    print(models.machine())
    peaks = {}
    for depth in arguments.depths:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            size = models.save_llama(model, layers=depth, hidden=768, intermediate=2048)
            command = [
                sys.executable,
                "-m",
                "tests.bench.bench_memory",
                "--recipes",
                *arguments.recipes,
                "--measure",
                str(model),
            ]
            done = subprocess.run(
                [*command, str(Path(scratch) / "work")], check=True, stdout=subprocess.PIPE, text=True
            )
        said = json.loads(done.stdout.splitlines()[-1])
        peaks[depth] = said["peak"]
        print(
            f"  {depth} layers, {size / 1e6:.0f} MB: peak {said['peak'] / 1e6:.0f} MB, "
            f"{said['imports'] / 1e6:.0f} MB of it before the pass"
        )
    first, last = arguments.depths[0], arguments.depths[-1]
    print(f"  {last} layers need {peaks[last] / peaks[first]:.3f} times what {first} need")


if __name__ == "__main__":
    main()
