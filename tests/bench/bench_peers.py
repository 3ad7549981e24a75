"""GPTQ and AWQ beside gptqmodel's and llm-compressor's: KL and seconds, the same tokens, bits, groups and symmetry.

python -m tests.bench.bench_peers --gptqmodel ENV --llmcompressor ENV [--model FOLDER ...] [--only WORDS]

ENV is a virtual environment with the library (tests/bench/peers/README.md says how they are made). Every tool runs in a
process of its own with two threads; seconds are those of quantizing, without loading, saving or imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench import models
from workers.errors import QuantmillError
from workers.formats.decoded import open_decoded
from workers.model.loading import load_tensors

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "tests" / "zoo"
HELD_OUT = 32  # sequences


@dataclass(frozen=True)
class Case:
    """One setting that every tool is given."""

    bits: int
    group: int | None
    symmetric: bool
    skip: str = ""

    @property
    def name(self) -> str:
        size = f"groups of {self.group}" if self.group else "one scale for each output"
        return f"{self.bits} bits, {size}, {'symmetric' if self.symmetric else 'asymmetric'}"

    def ours(self, method: str) -> dict[str, Any]:
        """The recipe."""
        scheme = {"bits": self.bits, "group_size": self.group, "symmetric": self.symmetric}
        ignore = ["lm_head", "*.mlp.gate", *([f"*{self.skip}"] if self.skip else [])]
        fmt = "compressed-tensors" if self.symmetric else "gptq"
        return {"name": "bench", "method": method, "scheme": scheme, "format": fmt, "ignore": ignore}

    def gptqmodel(self) -> dict[str, Any]:
        """Settings of peers/run_gptqmodel.py."""
        dynamic = {"dynamic": {f"-:.*{self.skip}": {}}} if self.skip else {}
        config = {"bits": self.bits, "group_size": self.group or -1, "sym": self.symmetric, **dynamic}
        return {"method": "gptq", "config": config, "quantize": {"batch_size": 8}}

    def llmcompressor(self, method: str) -> dict[str, Any]:
        """Settings of peers/run_llmcompressor.py."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group,
        }
        ignore = ["lm_head", "re:.*mlp.gate$", *([f"re:.*{self.skip}$"] if self.skip else [])]
        groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ignore}
        modifiers: list[Any] = [["GPTQModifier", groups]]
        if method == "awq":
            modifiers = [["AWQModifier", {}], ["QuantizationModifier", groups]]
        return {"oneshot": {"batch_size": 8}, "modifiers": modifiers}


@dataclass(frozen=True)
class Material:
    """A model, the tokens that all calibrate on, those that they're compared on, and what the source makes of those."""

    folder: Path
    tokens: Path
    held_out: Tensor
    reference: Tensor


def material(folder: Path, scratch: Path) -> Material:
    """128 sequences to calibrate on, and others to compare on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if folder.parent.parent == ZOO or folder.name.startswith("random"):
        length, texts = 512, [ZOO / "text" / "calibration.txt", ZOO / "text" / "heldout.txt"]
    else:
        length, texts = 256, [ROOT.parent / "shared" / "text" / "tinystories-sample.txt"] * 2
    pools = [_sequences(tokenizer, text, length) for text in texts]
    held_out = pools[1][-HELD_OUT:]
    chosen = sorted(random.Random(0).sample(range(len(pools[0]) - HELD_OUT), 128))
    path = scratch / f"{folder.name}.safetensors"
    save_file({"tokens": pools[0][chosen].contiguous()}, path)
    return Material(folder, path, held_out, _log_probabilities(_plain(folder), held_out))


def _sequences(tokenizer: Any, text: Path, length: int) -> Tensor:
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _plain(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=row[None]).logits[0].double().log_softmax(-1) for row in tokens])


def divergence(checkpoint: Path, of: Material) -> tuple[float, float]:
    """Mean KL of an artifact from its source, nats a token, and the share of tokens whose first choice is the same."""
    model = _plain(of.folder)
    with open_decoded(checkpoint) as decoded:
        load_tensors(model, {name: decoded.read(name) for name in decoded.headers}, torch.float32, "cpu")
    got = _log_probabilities(model, of.held_out)
    kl = (of.reference.exp() * (of.reference - got)).sum(-1).mean()
    return float(kl), float((of.reference.argmax(-1) == got.argmax(-1)).double().mean())


def run(python: str, module: str, settings: dict[str, Any], of: Material, scratch: Path) -> dict[str, Any]:
    """One tool in its own process; its answer, with KL and top-1 where it made something."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    request = {"model": str(of.folder), "tokens": str(of.tokens), "out": str(folder / "out"), "threads": 2}
    (folder / "request.json").write_text(json.dumps({**request, "settings": settings}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
        "GPTQMODEL_CPU_WORKERS": "2",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [python, "-m", f"tests.bench.peers.{module}", str(folder / "request.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not (folder / "answer.json").is_file():
        return {"error": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "no answer"}
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    if not answer["error"]:
        try:
            answer["kl"], answer["top1"] = divergence(Path(answer["checkpoint"]), of)
        except QuantmillError as error:
            answer["error"] = f"made in {answer['seconds']['quantize']:.1f} s, but can't be read: {error}"
    return answer


def cases(folder: Path) -> list[Case]:
    """Settings that all of the tools can run on a model."""
    if folder.name.startswith("random"):
        return [Case(4, 128, True)]
    if folder.parent.parent == ZOO:
        found = [Case(4, 128, True), Case(4, 32, True), Case(3, 32, True)]
        return [*found, Case(4, 128, False)] if "moe" not in folder.name else found[:1]
    # 172 is divided by no group size: the down projections stay as they are, or every output has one scale.
    return [Case(4, None, True), Case(4, 32, True, "down_proj"), Case(3, 32, True, "down_proj")]


def lines(arguments: argparse.Namespace, of: Material, scratch: Path) -> Iterator[str]:
    """A line of the table for each case and tool."""
    ours = sys.executable
    for case in cases(of.folder):
        tools: list[tuple[str, str | None, str, dict[str, Any]]] = [
            ("round to nearest", ours, "run_ours", case.ours("rtn")),
            ("quantmill GPTQ", ours, "run_ours", case.ours("gptq")),
            ("gptqmodel GPTQ", arguments.gptqmodel, "run_gptqmodel", case.gptqmodel()),
            ("llm-compressor GPTQ", arguments.llmcompressor, "run_llmcompressor", case.llmcompressor("gptq")),
            ("quantmill AWQ", ours, "run_ours", {**case.ours("awq"), **({} if case.symmetric else {"format": "awq"})}),
            ("llm-compressor AWQ", arguments.llmcompressor, "run_llmcompressor", case.llmcompressor("awq")),
        ]
        for name, environment, module, settings in tools:
            if environment is None or arguments.only not in f"{case.name} {name}":
                continue
            python = environment if environment == ours else str(Path(environment) / "bin" / "python")
            answer = run(python, module, settings, of, scratch)
            said = (
                f"{answer['error'][:160]} |  | "
                if answer.get("error")
                else (f"{answer['kl']:.5f} | {answer['top1']:.4f} | {answer['seconds']['quantize']:.1f}")
            )
            yield f"| {of.folder.name} | {case.name} | {name} | {said} |"


def _random(scratch: Path) -> Path:
    """Large enough for the arithmetic to count; what KL says of it means little."""
    folder = scratch / "random-llama-4x1024"
    models.save_llama(folder, layers=4, hidden=1024, intermediate=2816)
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gptqmodel")
    parser.add_argument("--llmcompressor")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="left out: a larger one with random weights")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    print(models.machine())
    print("| model | setting | tool | KL | top-1 | s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for folder in arguments.model or [_random(Path(scratch))]:
            for line in lines(arguments, material(folder.resolve(), Path(scratch)), Path(scratch)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
