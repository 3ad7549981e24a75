"""The driver on a cluster that it didn't start: several nodes, one with a logical GPU, publishing to a Hub by URL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.fleet.cluster import Where, compute
from pipeline.loopback import LoopbackHub
from tests.pipeline.runs import MODELS, by_key, command, write_zoo
from tests.workers.jobs import job
from workers.errors import PreflightError
from workers.run import StageRequest
from workers.spec.job import Stage, StageResult

START = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
def test_jobs_go_to_the_nodes_of_a_cluster(tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny"), str(MODELS / "gpt2-tiny")], "bnb-fp4")
    head = subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = next(line.strip() for line in head.stdout if ":" in line and " " not in line.strip())
        refused = subprocess.run(
            [*command(zoo, tmp_path / "runs"), "--address", address],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "the loopback Hub can't be reached from the cluster" in refused.stderr
        with LoopbackHub(tmp_path / "hub") as hub:
            zoo.write_text(zoo.read_text().replace("endpoint: loopback", f"endpoint: {hub.endpoint!r}"))
            done = subprocess.run(
                [*command(zoo, tmp_path / "runs"), "--address", address],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads(Path(done.stdout.strip().splitlines()[-2]).read_text())
        assert [entry["status"] for entry in by_key(results).values()] == ["published"] * 2
    finally:
        head.stdin.close()
        head.stdout.close()
        assert head.wait(60) == 0


def test_a_stage_without_a_parent_runs_from_nothing_and_says_so(tmp_path: Path) -> None:
    told = StageRequest(
        job=job(MODELS / "llama-tiny", tmp_path, "bnb-nf4"), stage=Stage.FETCH, seconds=60
    ).model_dump_json()
    for warm, note in (
        ((None, "not started warm: because"), "not started warm: because"),
        ((str(tmp_path / "socket"), None), f"not started warm: no parent at {tmp_path / 'socket'}"),
        ((None, None), None),
    ):
        result = StageResult.model_validate_json(compute(told, Where(None, None, 1), warm))
        assert result.failure is None
        assert result.notes == ((note,) if note else ())
    with pytest.raises(PreflightError, match="/nowhere/python doesn't start any more"):
        compute(told, Where(None, "/nowhere/python", 1), (None, None))
