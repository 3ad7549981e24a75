"""A run whose processes are killed at random, drivers included, makes what a quiet one makes, each artifact once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from statistics import median

import pytest

from pipeline.zoo import shipped
from tests.limits import AGENTS_SECONDS, GONE_SECONDS, NIGHT_TEST_SECONDS
from tests.pipeline.runs import MARK, MODELS, TEXT, command, marked_processes, wait_for

ALL = ("bnb-nf4", "bnb-fp4", "bnb-int8", "rtn-w4-g128", "fp8-dynamic", "fp8-static", "gptq-w4-g128", "awq-w4-g128",
       "mxfp4", "w8a8-int8")  # fmt: skip
# Of each model, the recipes that it gets: 30 artifacts.
ASKED = {"llama-tiny": ALL, "llama-twin": ALL, "llama-other": ALL[:7], "gpt2-tiny": ALL[:3]}
ZOO = """
name: chaos
models: [{models}]
recipes: [{recipes}]
calibration: {{dataset: {{path: text, data_files: [{text}/calibration.txt]}}, samples: 8, sequence_length: 128}}
verify:
  dataset: {{path: text, data_files: [{text}/heldout.txt]}}
  tokens: 1024
  sequence_length: 128
  gates: {{{gates}}}
publish: {{endpoint: {endpoint!r}, namespace: acme}}
"""
WIDE = "{kl_mean: 99, top1_agreement: 0.001, perplexity_ratio: 99, runtime_logit_difference: 9}"
MOST_RUNS = 60
# Seconds between two kills, in those that an artifact's verification takes.
PAUSE = 0.5


def retrained(source: Path, place: Path, seed: int) -> Path:
    """A model like another, with other weights."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, place)
    torch.manual_seed(seed)
    for path in place.glob("*.safetensors"):
        tensors = {
            name: tensor * (1 + 0.02 * torch.randn(1)).to(tensor.dtype) for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    return place


def zoo_file(folder: Path, endpoint: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "zoo.yaml"
    recipes = sorted({name for names in ASKED.values() for name in names})
    families = {shipped.recipe(name).scheme.family for name in recipes}
    places = {name: MODELS / name if (MODELS / name).is_dir() else folder.parent / name for name in ASKED}
    path.write_text(
        ZOO.format(
            models=", ".join(f"{{id: {places[name]}, recipes: [{', '.join(ASKED[name])}]}}" for name in ASKED),
            recipes=", ".join(recipes),
            text=TEXT,
            gates=", ".join(f"{family}: {WIDE}" for family in sorted(families)),
            endpoint=endpoint,
        )
    )
    return path


class Killer(threading.Thread):
    """Ends a random process of a run every ``seconds`` or so: a worker, its child, Ray's own, or the driver."""

    def __init__(self, mark: str, draw: random.Random, seconds: float) -> None:
        super().__init__(daemon=True)
        self.killed: list[str] = []
        self._mark, self._draw, self._seconds = mark, draw, seconds
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._seconds * self._draw.uniform(0.5, 1.5)):
            if victims := marked_processes(self._mark):
                victim = self._draw.choice(victims)
                try:
                    title = Path(f"/proc/{victim}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
                    os.kill(victim, signal.SIGKILL)
                except OSError:
                    continue
                self.killed.append(title)

    def stop(self) -> None:
        self._over.set()
        self.join(GONE_SECONDS)


def weights_published(hub: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file but the card and what differs between runs, by artifact; each was published once."""
    manifests = sorted(hub.rglob("quantmill.json"))
    found = {}
    for path in manifests:
        manifest = json.loads(path.read_text())
        artifact = f"{manifest['model']} {manifest['recipe']['name']}"
        assert artifact not in found, f"{artifact} was published twice"
        found[artifact] = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "README.md"}
    return found


def verify_seconds(runs: Path) -> list[float]:
    """What this machine takes to verify an artifact, each."""
    results = json.loads(next(runs.glob("*/results.json")).read_text())
    return [entry["seconds"]["verify"] for entry in results["artifacts"]]


@pytest.mark.night
@pytest.mark.timeout(NIGHT_TEST_SECONDS)
def test_a_run_in_chaos_makes_what_a_quiet_one_makes(tmp_path: Path) -> None:
    draw = random.Random(0)
    retrained(MODELS / "llama-tiny", tmp_path / "llama-twin", 1)
    retrained(MODELS / "llama-tiny", tmp_path / "llama-other", 2)
    published, pause = {}, 0.0
    for name in ("quiet", "chaos"):
        folder = tmp_path / name
        target = f"file://{folder}/published"
        zoo, runs, killed = zoo_file(folder, target), 0, list[str]()
        code = None
        while code != 0 and runs < (1 if name == "quiet" else MOST_RUNS):
            mark = uuid.uuid4().hex
            killer = Killer(mark, draw, pause)
            begun = time.monotonic()
            process = subprocess.Popen(
                command(zoo, folder / "runs"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, MARK: mark},
            )  # fmt: skip
            if name == "chaos":
                killer.start()
            said, _ = process.communicate()
            code, runs = process.returncode, runs + 1
            if name == "chaos":
                killer.stop()
            killed += killer.killed
            print(
                f"{name} run {runs}: {code} after {time.monotonic() - begun:.0f} s, {len(killer.killed)} killed",
                flush=True,
            )
            if code not in (0, -signal.SIGKILL):
                print(said[-1500:])
            assert wait_for(lambda mark=mark: not marked_processes(mark), AGENTS_SECONDS), marked_processes(mark)  # type: ignore[misc]
        assert code == 0, f"{name}: not done after {runs} runs"
        if name == "quiet":
            # Most of what is killed ends the run: with kills much closer than this, no stage would ever end.
            pause = PAUSE * median(verify_seconds(folder / "runs"))
            print(f"a process is killed every {pause:.1f} s", flush=True)
        published[name] = weights_published(folder / "published")
        print(f"{name}: {len(published[name])} artifacts in {runs} runs, {len(killed)} processes killed", flush=True)
        print("\n".join(killed))
        assert len(published[name]) == sum(len(names) for names in ASKED.values())
    assert published["chaos"] == published["quiet"]
