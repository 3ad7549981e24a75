"""Data-free recipes against the disk and their own arithmetic: a plain copy, the kernel alone, and the whole stage.

python -m tests.bench.bench_datafree [--recipes NAME ...]

The copy reads the source's files and writes as many bytes as the artifact has, to the disk; the kernel codes and packs
every weight that lies in memory already. The stage should take no longer than twice the copy and the kernel.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from pipeline.zoo import shipped
from tests.bench import models
from workers.checkpoint.source import Source
from workers.engines import bitsandbytes
from workers.formats.table import CODECS
from workers.methods import linear, schemes
from workers.methods.layer import Factors, Layer
from workers.model.loading import StreamedModel
from workers.quantize.one_pass import quantize
from workers.spec.recipes import BitsAndBytesRecipe, Recipe
from workers.spec.workspace import artifact_folder

RECIPES = ("bnb-nf4", "rtn-w4-g128", "fp8-dynamic", "fp8-block", "hqq-w4-g64", "mxfp4", "nvfp4")
CHUNK = 1 << 24


def copied(model: Path, target: Path, size: int) -> float:
    """Seconds to read the source and to write ``size`` bytes of it."""
    begun = time.perf_counter()
    with target.open("wb") as writing:
        left = size
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb") as reading:
                while piece := reading.read(CHUNK):
                    writing.write(piece[:left])
                    left = max(left - len(piece), 0)
        writing.flush()
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - begun
    target.unlink()
    return seconds


def kernel(model: Path, recipe: Recipe) -> float:
    """Seconds to code and pack all weights, read before."""
    with Source(model) as source:
        streamed = StreamedModel(model, source, dtype=torch.float32)
        tensors = {weight.key: source.read(weight.key) for weight in streamed.weights}
        begun = time.perf_counter()
        if isinstance(recipe, BitsAndBytesRecipe):
            for tensor in tensors.values():
                bitsandbytes.quantize(tensor, recipe.scheme, transposed=False)
            return time.perf_counter() - begun
        chosen = schemes.schemes_of(recipe, streamed)
        layer = Layer(lambda w: tensors[w.key], lambda w: None, torch.bfloat16, Factors())
        weights = [(weight, chosen[weight.key]) for weight in streamed.weights if weight.key in chosen]
        for coded in linear.code_layer(recipe, weights, layer):
            CODECS[recipe.format].encode(coded.codes, chosen[coded.weight.key])
        return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    arguments = parser.parse_args()
    print(models.machine())
    print("| recipe | copy | kernel | stage | of 2 x copy + kernel |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model, workspace = Path(scratch) / "model", Path(scratch) / "work"
        models.save_llama(model, layers=4, hidden=2048, intermediate=5632)
        quantize(models.job(model, workspace, "bnb-nf4"), model)  # the reference, and every import
        for name in arguments.recipes:
            of = models.job(model, workspace, name)
            place = artifact_folder(str(workspace), of.orders[0])
            shutil.rmtree(place, ignore_errors=True)
            begun = time.perf_counter()
            made, _ = quantize(of, model)
            seconds = time.perf_counter() - begun
            assert made[0].error is None, made[0].error
            copy = copied(model, Path(scratch) / "copy", made[0].bytes)
            alone = kernel(model, shipped.recipe(name))
            share = seconds / (2 * copy + alone)
            print(f"| {name} | {copy:.2f} s | {alone:.2f} s | {seconds:.2f} s | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
