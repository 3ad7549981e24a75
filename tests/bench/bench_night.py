"""A night in which nothing changed: 1,000 artifacts that stand published at a loopback Hub.

python -m tests.bench.bench_night [--models N]

The models are folders of a few weights each, the artifacts are published as manifests alone; everything else is what
`quantmill run` does: models pinned, fingerprints computed, manifests read from the Hub, results and report written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import save_file

from pipeline.loopback import LoopbackHub
from pipeline.planning import plan as planning
from pipeline.zoo import zoo as zoos
from tests.bench import models
from tests.pipeline.fleet.test_decisions import manifest
from workers.spec.job import HubLimits
from workers.spec.workspace import MANIFEST
from workers.transfer import hub
from workers.transfer.pace import LocalPace
from workers.transfer.revisions import tag_name

RECIPES = ("bnb-fp4", "bnb-int8", "bnb-nf4", "fp8-dynamic", "gptq-w4-g128", "gptq-w8-g128", "mxfp4", "nvfp4",
           "rtn-w4-g128", "w8a8-int8")  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "vocab_size": 16,
    "num_attention_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def make_models(folder: Path, count: int) -> None:
    """Folders that look like checkpoints of one layer."""
    for index in range(count):
        place = folder / f"model-{index}"
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(CONFIG))
        weight = torch.full((128, 128), float(index), dtype=torch.bfloat16)
        save_file({"model.layers.0.self_attn.q_proj.weight": weight}, place / "model.safetensors")


def publish(zoo_path: Path, out: Path, endpoint: str) -> int:
    """Put a manifest where each artifact would be; how many there are."""
    plan = planning.make_plan(zoos.load(zoo_path), zoo_path.parent, out, endpoint)
    # What is published here took many nights; the run that is measured keeps to a Hub's usual limits.
    hub.connect(endpoint, LocalPace(HubLimits(requests=10**6, files=10**6, commits=10**6)))
    api = HfApi(endpoint=endpoint, token="hf_bench")
    for job in plan.jobs:
        for order in job.orders:
            assert order.repo_id is not None
            name = order.recipe.name
            said = manifest(job, name, accepted=True).model_copy(update={"verification": job.verification})
            api.create_repo(order.repo_id)
            content = said.model_dump_json().encode()
            operation = CommitOperationAdd(path_in_repo=MANIFEST, path_or_fileobj=content)
            api.create_commit(order.repo_id, [operation], commit_message="made")
            api.create_tag(order.repo_id, tag=tag_name(order.fingerprint))
    return len(plan.artifacts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=100)
    count = parser.parse_args().models
    print(models.machine())
    with tempfile.TemporaryDirectory() as scratch, LoopbackHub(Path(scratch) / "hub") as server:
        folder = Path(scratch)
        make_models(folder / "models", count)
        text = {"path": "text", "data_files": [str(models.TEXT / "calibration.txt")]}
        zoo = {
            "name": "night",
            "models": [{"id": str(folder / "models" / f"model-{index}")} for index in range(count)],
            "recipes": list(RECIPES),
            "calibration": {"dataset": text},
            "verify": {"dataset": {**text, "data_files": [str(models.TEXT / "heldout.txt")]}},
            "publish": {"endpoint": server.endpoint, "namespace": "acme"},
        }
        path = folder / "zoo.yaml"
        path.write_text(yaml.safe_dump(zoo))
        made = publish(path, folder / "runs", server.endpoint)
        command = [sys.executable, "-m", "pipeline.cli", "run", str(path), "--out", str(folder / "runs")]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        results = json.loads(Path(done.stdout.strip().splitlines()[-2]).read_text())
        statuses = {entry["status"] for entry in results["artifacts"]}
        assert statuses == {"skipped"}, statuses
        assert not results["jobs"]
        print(f"  {made} artifacts stand published; the run ended after {seconds:.1f} s, no stage started")


if __name__ == "__main__":
    main()
