"""The driver on a cluster that it didn't start: several nodes, one with a logical GPU, publishing to a Hub by URL."""

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipeline.fleet.cluster import SLOW_START, Where, compute
from pipeline.loopback import LoopbackHub
from tests.limits import GONE_SECONDS, RUN_SECONDS
from tests.pipeline.runs import MARK, MODELS, ROOT, by_key, command, marked_processes, wait_for, write_zoo
from tests.workers.jobs import job
from workers.errors import PreflightError
from workers.machine.card_share import SHARE
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
    environment = {**os.environ, **SLOW_START, "RAY_AUTH_MODE": "disabled"}
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
        looked = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "doctor", "gptq-w4-g128", "eetq-int8", "--address", address],
            env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert looked.returncode == 1, looked.stderr
        ready, lacks = re.findall(r"^(?:gptq-w4-g128|eetq-int8) +(.+?) *$", looked.stdout, re.M)
        assert re.fullmatch(r"ready on \S+ \(\w{8}\), \S+ \(\w{8}\)", ready)
        assert "ready" not in lacks
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
        assert head.wait(GONE_SECONDS) == 0


def test_a_stage_without_a_parent_runs_from_nothing_and_says_so(tmp_path: Path) -> None:
    stage_job = job(MODELS / "llama-tiny", tmp_path, "bnb-nf4")
    told = StageRequest(job=stage_job, stage=Stage.FETCH, seconds=RUN_SECONDS).model_dump_json()
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


STARTS = """
import os, sys
from pathlib import Path
from pipeline.fleet import cluster
from workers.errors import ClusterLost
cluster._set_up_environment(embedded=True)
import ray
from ray._private import services

how, folder = sys.argv[1], Path(sys.argv[2])
get_node, asked = services.get_node, []

def gives_up(*arguments):
    asked.append(arguments)
    if how == "never" or len(asked) == 1:
        raise Exception("The current node timed out\\nduring startup.")
    return get_node(*arguments)

if how == "slowly":
    slow = folder / "raylet"
    slow.write_text(f'#!/bin/sh\\nsleep 40\\nexec {services.RAYLET_EXECUTABLE} "$@"\\n')
    slow.chmod(0o755)
    services.RAYLET_EXECUTABLE = str(slow)
else:
    services.get_node = gives_up
try:
    with cluster.Cluster(None, folder) as ours:
        print(len(ours.nodes()), len(asked), "servers:", flush=True)
        print(os.popen(f"pgrep -c -P {os.getpid()} gcs_server").read())
except ClusterLost as error:
    print(type(error).__name__, error, len(asked), ray.is_initialized())
    print(os.popen(f"pgrep -c -P {os.getpid()} 'gcs_server|raylet'").read())
"""


@pytest.mark.parametrize(
    ("how", "said", "told"),
    [
        pytest.param(
            "once",
            "1 2 servers:\n1",
            "Ray didn't start (The current node timed out during startup.); trying again\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "never",
            "ClusterLost Ray doesn't start on this machine, tried 3 times (The current node timed out during startup.)",
            "",
            marks=pytest.mark.night,
        ),
        pytest.param("slowly", "1 0 servers:\n1", "", marks=pytest.mark.night),
    ],
)
def test_a_ray_that_starts_slowly_is_waited_for_and_one_that_gives_up_tried_again(
    how: str, said: str, told: str, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [sys.executable, "-c", STARTS, how, str(tmp_path)],
        env={**os.environ, MARK: mark}, capture_output=True, text=True, check=False, timeout=RUN_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert told in done.stderr
    if how == "never":
        assert done.stdout.endswith("3 False\n0\n\n"), "what was half started was ended, each time"
    # Ray's own agents of a raylet that had to be killed give up after a minute without it.
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    assert wait_for(lambda: not marked_processes(mark, agents), GONE_SECONDS), marked_processes(mark, agents)


@pytest.mark.parametrize(("share", "said"), [(0.25, "0.250000"), (1.0, ""), (0.0, "")])
def test_a_stage_is_told_its_share_of_a_card(share: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARE, "0.5")  # of this process, not of the stage's
    ended = Where(None, None, 1, "", share).ask("os:getenv", SHARE, (None, None))
    assert ended.answer == said, ended.stderr
