"""Measure MLX artifacts beside ``mlx_lm.convert`` at the same bits: KL to the source, both run in mlx-lm.

``python -m tests.bench.bench_mlx llama-tiny qwen3-moe-tiny mlx-nvfp4`` (recipes: all, if none is named); needs the
environment mlx (`quantmill env create mlx`). With --gptq or --dwq: mlx-lm's own on the same calibration tokens.
The held-out text, its tokens and the reference's logits are those of a verification.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.zoo import shipped
from tests.workers import jobs
from workers.checkpoint.source import Source
from workers.machine.environments import interpreter
from workers.model.forward import LogitsHead, stream
from workers.model.text import calibration_tokens
from workers.quantize.one_pass import quantize
from workers.spec.mlx import settings
from workers.spec.runtimes import MLX_LM, RuntimeRequest
from workers.verify.comparison import Comparison
from workers.verify.runtimes.ask import ask

CONVERT = """
import json, sys, time
from mlx_lm.convert import convert
begun = time.time()
convert(hf_path=sys.argv[1], mlx_path=sys.argv[2], quantize=True, **json.loads(sys.argv[3]))
print(json.dumps(time.time() - begun))
"""
# Ours, and the settings of convert with the same bits for layers, embeddings and head.
PAIRS: dict[str, dict[str, Any]] = {
    "mlx-w3-g64": {"q_bits": 3, "q_group_size": 64},
    "mlx-w4-g64": {"q_bits": 4, "q_group_size": 64},
    "mlx-w6-g64": {"q_bits": 6, "q_group_size": 64},
    "mlx-w8-g64": {"q_bits": 8, "q_group_size": 64},
    "mlx-mixed-4-6": {"quant_predicate": "mixed_4_6"},
    "mlx-mxfp4": {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "mlx-nvfp4": {"q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
}


GPTQ = """
import sys
import mlx.core as mx
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load, save
from safetensors.numpy import load_file
model, tokenizer, config = load(sys.argv[1], lazy=True, return_config=True)
tokens = mx.array(load_file(sys.argv[3])["tokens"].astype("int32"))
model, config["quantization"] = gptq_quantize(model, tokens, 4, 64, 4, 64)
save(sys.argv[2], sys.argv[1], model, tokenizer, config)
"""


DWQ = """
import copy, sys
import mlx.core as mx, mlx.optimizers as optimizers
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.utils import load, quantize_model, save
from safetensors.numpy import load_file
model, tokenizer, config = load(sys.argv[1], lazy=True, return_config=True)
rows = [(row, 0) for row in load_file(sys.argv[3])["tokens"].astype("int32").tolist()]
quantized, config = quantize_model(copy.deepcopy(model), config, group_size=64, bits=4)
optimizer = optimizers.Adam(learning_rate=float(sys.argv[4]), bias_correction=True)
dwq_quantize(quantized, lambda batch, index, split: model(batch), optimizer, rows[:-16], rows[-16:], 4, 257, 123)
save(sys.argv[2], sys.argv[1], quantized, tokenizer, config)
"""
# By option: its name in the table, the script, and further arguments. DWQ's learning rate of 1e-6 is for large models.
PEERS: dict[str, tuple[str, str, list[str]]] = {
    "--gptq": ("mlx-lm's GPTQ, 4 bits", GPTQ, []),
    "--dwq": ("mlx-lm's DWQ, 4 bits", DWQ, ["1e-5"]),
}


def peer_row(model: str, peer: str) -> str:
    """KL and seconds of mlx-lm's own method, 4 bits in groups of 64, on the same calibration text."""
    source = jobs.ZOO / "models" / model
    label, script, arguments = PEERS[peer]
    with tempfile.TemporaryDirectory() as place, Source(source) as opened:
        folder = Path(place)
        job = jobs.job(source, folder / "runs", shipped.recipe("mlx-w4-g64"), samples=128)
        text = job.verification.model_copy(update={"tokens": 2048, "sequence_length": 256})
        comparison = Comparison.of_job(job.model_copy(update={"verification": text}), opened)
        comparison.load()
        reference = LogitsHead(comparison.reference).logits(
            torch.cat(stream(comparison.reference, [comparison.tokens]))
        )
        assert job.calibration is not None
        (tokens,) = calibration_tokens(job.calibration, comparison.tokenizer).groups
        save_file({"tokens": tokens}, folder / "calibration.safetensors")
        paths = [_readable(source, folder / "source"), folder / "out", folder / "calibration.safetensors"]
        command = [str(interpreter("mlx")), "-c", script, *map(str, paths), *arguments]
        begun = time.monotonic()
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        kl = _kl(reference, _logits(folder / "out", comparison.tokens, folder))
        return f"| {model} | {label} | {kl:.5f} | {time.monotonic() - begun:.1f} s |"


def rows(model: str, pairs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line of the table for each recipe."""
    source = jobs.ZOO / "models" / model
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = jobs.job(source, folder / "runs", *(shipped.recipe(name) for name in pairs), samples=128)
        text = job.verification.model_copy(update={"tokens": 2048, "sequence_length": 256})
        job = job.model_copy(update={"verification": text})
        with Source(source) as opened:
            comparison = Comparison.of_job(job, opened)
            comparison.load()
            tokens = comparison.tokens
            reference = LogitsHead(comparison.reference).logits(torch.cat(stream(comparison.reference, [tokens])))
        begun = time.monotonic()
        made, _ = quantize(job, source)
        seconds = time.monotonic() - begun
        for order, ours in zip(job.orders, made, strict=True):
            assert ours.error is None, ours.error
            name = order.recipe.name
            theirs, theirs_seconds = _converted(
                _readable(source, folder / "source"), folder / f"{name}-convert", pairs[name]
            )
            kl = [_kl(reference, _logits(path, tokens, folder)) for path in (Path(ours.path), theirs)]
            size = sum(path.stat().st_size for path in theirs.glob("*.safetensors"))
            yield (
                f"| {model} | {name} | {kl[0]:.5f} | {kl[1]:.5f} | {kl[0] / kl[1]:.2f} | {ours.bytes / 1e6:.2f} | "
                f"{size / 1e6:.2f} | {ours.seconds:.1f} | {theirs_seconds:.1f} |"
            )
        yield f"| {model} | the whole pass | | | | | | {seconds:.1f} | |"


def _readable(source: Path, copy: Path) -> Path:
    """The source with the keys of config.json that mlx-lm needs, and transformers 5 doesn't save."""
    shutil.copytree(source, copy, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    added = settings({**config, "quantization_config": {}})
    del added["quantization"]
    (copy / "config.json").write_text(json.dumps(config | added))
    return copy


def _converted(source: Path, out: Path, settings: dict[str, Any]) -> tuple[Path, float]:
    command = [str(interpreter("mlx")), "-c", CONVERT, str(source), str(out), json.dumps(settings)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=out.parent)
    return out, float(done.stdout.splitlines()[-1])


def _logits(artifact: Path, tokens: Tensor, folder: Path) -> Tensor:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file({"tokens": tokens}, Path(scratch) / "tokens.safetensors")
        answer = ask(MLX_LM, RuntimeRequest(artifact=str(artifact), scratch=scratch), tokens, tokens[:1, :8].clone())
    assert answer.logits is not None, answer.problems
    logits: Tensor = answer.logits
    return logits


def _kl(reference: Tensor, logits: Tensor) -> float:
    ours, theirs = logits[:, :-1].double().log_softmax(-1), reference[:, :-1].double().cpu().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


if __name__ == "__main__":
    print("| model | recipe | KL | KL of convert | ratio | MB | MB of convert | s | s of convert |")
    print("|---|---|---|---|---|---|---|---|---|")
    for peer in PEERS.keys() & set(sys.argv):
        for wanted in sys.argv[1:]:
            if wanted not in PEERS:
                print(peer_row(wanted, peer), flush=True)
    if PEERS.keys() & set(sys.argv):
        sys.exit()
    named = {name: PAIRS[name] for name in sys.argv[1:] if name in PAIRS}
    for wanted in [name for name in sys.argv[1:] if name not in PAIRS] or ["llama-tiny", "qwen3-moe-tiny"]:
        for line in rows(wanted, named or PAIRS):
            print(line, flush=True)
