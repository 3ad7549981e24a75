"""GGUF beside llama.cpp's own encoder with the same importance matrix: KL, bytes and seconds of each mix.

python -m tests.bench.bench_gguf [--model llama-tiny] [--mixes q4_0,q4_k_m,q3_k_m,q2_k] [--text FILE]

A model of the zoo or a folder; of a text, the first three quarters calibrate and the rest is held out. Both come from
one pass, with the same types and the same scales to begin with; 4,096 held-out tokens, our decoding. Needs the
environment llama-cpp (`quantmill env create llama-cpp`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.workers import jobs
from workers.checkpoint.source import Source
from workers.formats.decoded import open_decoded
from workers.model import reference
from workers.model.forward import LogitsHead, stream
from workers.quantize.one_pass import quantize
from workers.spec.job import Dataset, Job
from workers.spec.recipes import Recipe
from workers.verify.comparison import Comparison

TOKENS, SAMPLES = 4096, 128


def recipe(mix: str, codes: str) -> Recipe:
    """A mix with codes solved, or llama.cpp's own."""
    name, scheme = f"gguf-{mix}-{'solved' if codes == 'solved' else 'own'}", {"type": "gguf-mix", "mix": mix}
    return jobs.recipe(name=name, method="ggml", scheme=scheme, format="gguf", options={"codes": codes})


def on(job: Job, text: Path, folder: Path) -> Job:
    """The job, calibrated on the first three quarters of a text and compared on the rest."""
    lines = text.read_text().splitlines(keepends=True)
    parts = lines[: len(lines) * 3 // 4], lines[len(lines) * 3 // 4 :]
    found = []
    for name, part in zip(("calibration", "heldout"), parts, strict=True):
        (folder / f"{name}.txt").write_text("".join(part))
        found.append(Dataset(path="text", data_files=(str(folder / f"{name}.txt"),)))
    calibration, verification = job.calibration, job.verification
    assert calibration is not None, "the recipes are calibrated"
    return job.model_copy(
        update={
            "calibration": calibration.model_copy(update={"dataset": found[0]}),
            "verification": verification.model_copy(update={"dataset": found[1]}),
        }
    )


def main() -> None:
    """Print a row for each mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--mixes", default="q4_0,q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--text", type=Path)
    given = parser.parse_args()
    folder = jobs.ZOO / "models" / given.model  # an absolute path stays as it is
    recipes = [recipe(mix, codes) for mix in given.mixes.split(",") for codes in ("llama.cpp", "solved")]
    with tempfile.TemporaryDirectory() as scratch, Source(folder) as source:
        job = jobs.job(folder, Path(scratch), *recipes, samples=SAMPLES)
        job = job.model_copy(update={"verification": job.verification.model_copy(update={"tokens": TOKENS})})
        if given.text:
            job = on(job, given.text, Path(scratch))
        made, _ = quantize(job, folder)
        compared = Comparison.of_job(job, source)
        compared.load()
        for artifact in made:
            assert artifact.error is None, artifact.error
            with open_decoded(Path(artifact.path)) as opened:
                ours = compared._streamed(Path(artifact.path), opened)
                hidden = stream(ours, reference.micro_batches(compared.tokens))
                metrics = compared._metrics(LogitsHead(ours), hidden)
            print(f"{artifact.recipe:22s} {artifact.bytes:9d} bytes {artifact.seconds:6.1f} s KL {metrics.kl_mean:.5f}")


if __name__ == "__main__":
    main()
