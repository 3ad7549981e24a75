"""What only real Ray shows: two drivers at the same zoo, a pass spread over processes, metrics at its endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.fleet.cluster import SLOW_START
from pipeline.loopback import LoopbackHub
from tests.limits import LONG_TEST_SECONDS, RAY_SECONDS, RUN_SECONDS
from tests.pipeline.runs import MODELS, by_key, command, write_zoo


@pytest.mark.slow
@pytest.mark.timeout(LONG_TEST_SECONDS)
def test_two_drivers_at_the_same_zoo_make_every_artifact_once(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-fp4, rtn-w4-g128")
    with LoopbackHub(tmp_path / "hub") as hub:
        zoo.write_text(zoo.read_text().replace("endpoint: loopback", f"endpoint: {hub.endpoint!r}"))
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        drivers = [
            subprocess.Popen(command(zoo, tmp_path / name), stdout=subprocess.PIPE, text=True, env=environment)
            for name in ("one", "two")
        ]
        said = [driver.communicate(timeout=2 * RUN_SECONDS)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], said
    results = [by_key(json.loads(Path(text.strip().splitlines()[-2]).read_text())) for text in said]
    for key in results[0]:
        statuses = sorted(each[key]["status"] for each in results)
        assert statuses == ["published", "skipped"], (key, statuses)
        skipped = next(each[key] for each in results if each[key]["status"] == "skipped")
        assert skipped["commit"]
    made = [sum(1 for _ in (tmp_path / name).glob("artifacts/*/model.safetensors")) for name in ("one", "two")]
    assert sorted(made) == [0, 2], "both made something"


SPREAD = """
import sys
from pathlib import Path
from pipeline import session
from pipeline.zoo import zoo as zoos
from pipeline.fleet.cluster import Cluster
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.steps import Step

class Watch:
    def started(self, job, step, attempt): print("started", step.stage, step.part and step.part.step, flush=True)
    def ended(self, job, step, attempt, result, retry_in): print("ended", step.stage, result.failure, flush=True)

path, out = Path(sys.argv[1]), Path(sys.argv[2])
plan = session.make_plan(zoos.load(path), path, out, None)
with Cluster(None, out) as cluster:
    driver = Driver(cluster, plan, [Watch()], spread_seconds=float(sys.argv[3]))
    driver.run()
for run in driver.jobs:
    for artifact in run.artifacts.values():
        assert artifact.failure is None, artifact.failure
        assert artifact.manifest is not None and artifact.manifest.verdict.accepted, artifact.manifest
"""


@pytest.mark.night
@pytest.mark.timeout(LONG_TEST_SECONDS)
def test_the_last_model_spread_over_processes_has_the_bytes_of_one_pass(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "gptq-w4-g128, bnb-nf4")
    zoo.write_text("\n".join(line for line in zoo.read_text().splitlines() if not line.startswith("publish")))
    made = {}
    for name, seconds in (("whole", "inf"), ("spread", "0")):
        done = subprocess.run(
            [sys.executable, "-c", SPREAD, str(zoo), str(tmp_path / name), seconds],
            capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("gather" in done.stdout) == (name == "spread")
        assert done.stdout.count("ended quantize None") == 1
        made[name] = {
            f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name / "artifacts").glob("*/*.safetensors")
        }
    assert len(made["whole"]) == 2
    assert made["spread"] == made["whole"]


METRICS = """
import sys, time, urllib.request
import ray
from ray.cluster_utils import Cluster as Nodes
from pipeline.report.metrics import PrometheusMetrics
from pipeline.fleet.scheduler import Pulse
from pipeline.fleet.steps import Step
from workers.spec.job import Failure, Stage, StageResult

nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
metrics = PrometheusMetrics("night", lambda: Pulse(queued=7, running={Stage.FETCH: 1}, gpus=4, busy_gpus=3.0))
step = Step(0, Stage.FETCH)
metrics.started(None, step, 1)
metrics.ended(None, step, 1, StageResult(stage=Stage.FETCH, seconds=3.0), None)
metrics.ended(None, step, 2, StageResult(stage=Stage.FETCH, failure=Failure(kind="DiskFull", message="x")), None)
port, until, found = ray.nodes()[0]["MetricsExportPort"], time.time() + float(sys.argv[1]), ""
while "quantmill_gpu_busy_share" not in found and time.time() < until:
    time.sleep(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        found = answer.read().decode()
print("\\n".join(line for line in found.splitlines() if "quantmill_" in line and not line.startswith("#")))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.slow
def test_metrics_arrive_at_rays_endpoint() -> None:
    environment = {**os.environ, **SLOW_START, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", METRICS, str(RAY_SECONDS)],
        capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        if 'le="' not in labels and 'zoo="night"' in labels:
            found[name, tuple(part for part in labels.split(",") if part.startswith(("stage=", "error=")))] = float(
                value
            )
    assert found["ray_quantmill_gpu_busy_share", ()] == 0.75
    assert found["ray_quantmill_queued_jobs", ()] == 7
    assert found["ray_quantmill_running_stages", ('stage="fetch"',)] == 1
    failures = {labels: value for (name, labels), value in found.items() if "stage_failures" in name}
    assert failures == {('error="DiskFull"', 'stage="fetch"'): 1}
