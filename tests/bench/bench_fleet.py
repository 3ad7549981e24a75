"""How busy the GPUs of a real Ray cluster are: 40 jobs of mixed length on 4 logical GPUs, with stages that sleep.

python -m tests.bench.bench_fleet [--jobs N] [--seconds S]

Two nodes with two logical GPUs each. Stages sleep for their estimate (fetch and publish, too), those that compute in a
child of their node's warm parent, as real ones do. So what is measured is the driver and Ray: processes that start,
answers that travel, decisions.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.fleet.cluster import Cluster, Where
from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.steps import NETWORK_STAGES, Step
from tests.bench import models
from tests.pipeline.fleet.test_decisions import made, manifest
from tests.pipeline.simulated import plan_of, size
from workers.spec.job import Job, Stage, StageResult

RECIPES = ("bnb-nf4", "bnb-int8")
GPUS = 4


def seconds_of(stage: Stage, work: int, scale: float) -> float:
    """Verifying an artifact takes a tenth of the pass, transfers a fifth."""
    return scale * work * {Stage.QUANTIZE: 1.0, Stage.VERIFY: 0.1, Stage.FETCH: 0.2, Stage.PUBLISH: 0.2}[stage]


def sleep(request: str, where: Where, warm: Any, nap: float, answer: str) -> str:
    """A transfer that passes time, and gives the answer that it was told at the end."""
    time.sleep(nap)
    return answer


def sleep_apart(request: str, where: Where, warm: Any, nap: float, answer: str) -> str:
    """A stage that computes: the same in a process of its own, which has torch and transformers as a real one."""
    ended = where.ask("tests.bench.dozing:doze", json.dumps([nap, answer]), warm)
    assert ended.answer is not None, ended
    assert ended.note is None, ended.note
    return ended.answer


def answer(step: Step, of: Job) -> str:
    """What a stage that ends well answers."""
    match step.stage:
        case Stage.QUANTIZE:
            result = made(*(order.recipe.name for order in of.orders))
        case Stage.VERIFY:
            assert step.recipe is not None
            result = StageResult(stage=step.stage, recipe=step.recipe, manifest=manifest(of, step.recipe, True))
        case _:
            commit = "c" if step.stage == Stage.PUBLISH else None
            result = StageResult(stage=step.stage, recipe=step.recipe, commit=commit)
    return result.model_dump_json()


class SleepingCluster(Cluster):
    """Ray, and stages that sleep; keeps when each held a GPU."""

    def __init__(self, address: str, workspace: Path, naps: dict[tuple[int, Stage], float], jobs: list[Job]) -> None:
        super().__init__(address, workspace, warm=True)
        self._naps, self._jobs = naps, jobs
        self.spans: list[tuple[float, float, float]] = []  # begin, end, GPUs
        self.beyond: list[float] = []  # seconds that each was held beyond the sleep
        self._begun: dict[Step, tuple[float, float]] = {}

    def stage(self, step: Step) -> tuple[Any, tuple[Any, ...]]:
        stage = sleep if step.stage in NETWORK_STAGES else sleep_apart
        return stage, (self._naps[step.job, step.stage], answer(step, self._jobs[step.job]))

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        self._begun[step] = time.monotonic(), claim.gpus
        super().start(step, job, node, claim, seconds)

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        ended = super().wait(seconds)
        for step, _ in ended:
            begun, gpus = self._begun.pop(step)
            if gpus:
                self.spans.append((begun, time.monotonic(), gpus))
                self.beyond.append(time.monotonic() - begun - self._naps[step.job, step.stage])
        return ended


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=30.0, help="mean length of a pass")
    arguments = parser.parse_args()
    draw = random.Random(0)
    works = [round(1000 * draw.lognormvariate(0.0, 0.7)) for _ in range(arguments.jobs)]
    scale = arguments.seconds / (sum(works) / len(works))
    naps = {
        (index, stage): seconds_of(stage, work, scale)
        for index, work in enumerate(works)
        for stage in Stage
        if stage is not Stage.KEEP
    }
    print(models.machine())
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 2})
    nodes.add_node(num_cpus=8, num_gpus=2)
    try:
        plan = plan_of([size(work) for work in works], *RECIPES)
        with (
            tempfile.TemporaryDirectory() as out,
            SleepingCluster(nodes.address, Path(out), naps, list(plan.jobs)) as cluster,
        ):
            driver = Driver(cluster, plan, [])
            driver.run()
            commits = [artifact.commit for run in driver.jobs for artifact in run.artifacts.values()]
            assert commits == ["c"] * len(commits)
            report(cluster, naps, arguments.jobs)
    finally:
        nodes.shutdown()


def report(cluster: SleepingCluster, naps: dict[tuple[int, Stage], float], jobs: int) -> None:
    """Print the idle share while work was left, and the makespan beside its lower bound."""
    begun, ended = min(span[0] for span in cluster.spans), max(span[1] for span in cluster.spans)
    held = sum((end - begin) * gpus for begin, end, gpus in cluster.spans)
    asleep = sum(naps[job, stage] * (len(RECIPES) if stage == Stage.VERIFY else 1)
                 for job in range(jobs) for stage in (Stage.QUANTIZE, Stage.VERIFY))  # fmt: skip
    # While stages were left that hadn't begun: until the last one was given a GPU.
    last = max(span[0] for span in cluster.spans)
    until = sum((min(end, last) - min(begin, last)) * gpus for begin, end, gpus in cluster.spans)
    print(f"  {len(cluster.spans)} computing stages, {ended - begun:.1f} s on {GPUS} GPUs")
    print(f"  GPUs idle while work was left: {1 - until / ((last - begun) * GPUS):.1%}")
    longest = max(naps[job, Stage.QUANTIZE] + naps[job, Stage.VERIFY] for job in range(jobs))
    bound = max(asleep / GPUS, longest)
    print(f"  makespan {ended - begun:.1f} s, lower bound {bound:.1f} s: {(ended - begun) / bound:.3f} times")
    beyond = sorted(cluster.beyond)
    print(
        f"  a GPU was held beyond a stage's sleep for {median(beyond):.2f} s (median; 90 % within "
        f"{beyond[len(beyond) * 9 // 10]:.2f} s; {beyond[-1]:.2f} s at most, while its node's parent imported)"
    )
    print(f"  of the time that GPUs were held, stages slept {asleep / held:.1%}; the rest is processes starting")


if __name__ == "__main__":
    main()
