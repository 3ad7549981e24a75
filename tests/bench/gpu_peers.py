"""GPTQ of the stack of ``gpu_stack`` by llm-compressor and gptqmodel on the same card, and by quantmill beside them.

python -m tests.bench.gpu_peers --llmcompressor PYTHON --gptqmodel PYTHON [--layers 1 2] [--hidden 4096 ...]

PYTHON is the interpreter of an environment with the library. All tools get the same tokens, 4 bits, groups of 128 and
symmetric grids; each runs in a process of its own. Seconds are those of quantizing, without imports, loading and saving
(quantmill's: of the whole stage, which reads the checkpoint and writes the artifact). A layer is the difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.bench import gpu_stack
from tests.bench.bench_peers import ROOT, Case
from tests.bench.gpu_stack import ONE
from workers.model.text import calibration_tokens, load_tokenizer
from workers.run import run_stage
from workers.spec.job import Job, Stage

CASE = Case(bits=4, group=128, symmetric=True)
PEERS = ("llmcompressor", "gptqmodel")
HEADER = ("tool", "seconds of", "", "a layer")


def settings(tool: str) -> dict[str, Any]:
    """A peer's settings, with batches of eight sequences as the library documents."""
    return CASE.gptqmodel() if tool == "gptqmodel" else CASE.llmcompressor("gptq")


def ours(of: Job) -> float:
    """Seconds of the stage."""
    result = run_stage(of, Stage.QUANTIZE)
    failed = [made.error for made in result.artifacts if made.error]
    assert not result.failure, result.failure
    assert not failed, failed
    return result.seconds


def theirs(tool: str, python: str, of: Job, place: Path) -> float:
    """Seconds that a peer says it took."""
    place.mkdir()
    assert of.calibration is not None
    (tokens_NT,) = calibration_tokens(of.calibration, load_tokenizer(Path(of.model.folder or ""), of.model)).groups
    save_file({"tokens": tokens_NT}, place / "tokens.safetensors")
    request = {
        "model": of.model.folder, "tokens": str(place / "tokens.safetensors"), "out": str(place / "out"),
        "threads": torch.get_num_threads(), "settings": settings(tool),
    }  # fmt: skip
    (place / "request.json").write_text(json.dumps(request))
    command = [python, "-m", f"tests.bench.peers.run_{tool}", str(place / "request.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    file = place / "answer.json"
    assert file.is_file(), done.stderr[-4000:]
    answer = json.loads(file.read_text())
    assert not answer["error"], answer["traceback"]
    return float(answer["seconds"]["quantize"])


def rows(place: Path, given: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, ...]]:
    """The table's rows: seconds for few and for more layers, and of their difference for one."""
    few, many = given.layers
    jobs = {}
    for layers in (few, many):
        folder = place / f"stack-{layers}"
        gpu_stack.save_stack(folder, layers, given.hidden, given.inner, device)
        jobs[layers] = gpu_stack.job_of(folder, place / f"work-{layers}", ONE, given.samples, given.length)
    ours(gpu_stack.job_of(place / f"stack-{few}", place / "work-first", ONE, given.samples, given.length))
    tools = {"quantmill": ""} | {name: python for name in PEERS if (python := getattr(given, name))}
    for tool, python in tools.items():
        try:
            taken = {
                layers: theirs(tool, python, of, place / f"{tool}-{layers}") if python else ours(of)
                for layers, of in jobs.items()
            }
        except AssertionError as error:
            yield tool, f"failed: {' '.join(str(error).split())[-600:]}", "", ""
            continue
        seconds = [f"{layers} layer(s): {taken[layers]:.1f}" for layers in (few, many)]
        yield tool, *seconds, f"{(taken[many] - taken[few]) / (many - few):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PYTHON")
    gpu_stack.add_arguments(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantmill-peers-") as place:
        gpu_stack.print_table(given, HEADER, lambda device: rows(Path(place), given, device))


if __name__ == "__main__":
    main()
