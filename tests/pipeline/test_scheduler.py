"""The driver's decisions over a scripted cluster: transfers are bounded, and nodes may vanish at any moment."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cluster import Node
from pipeline.plan import Plan, PlannedArtifact
from pipeline.scheduler import TRANSFERS, Driver
from pipeline.sizing import STARTING_SECONDS, Estimate, deadline_seconds
from pipeline.sources import Source
from pipeline.steps import Step
from tests.pipeline.test_decisions import job, made, manifest
from workers.environment import Facts
from workers.job import Failure, Job, ModelPin, Stage, StageResult

PACKAGES = dict.fromkeys(
    ("torch", "transformers", "safetensors", "datasets", "huggingface_hub", "greenlet", "accelerate", "bitsandbytes"),
    "1",
)
DIED = Failure(kind="WorkerDied", message="gone")


class ScriptedCluster:
    """Two nodes; every step succeeds at once, but for those on a node that has vanished."""

    def __init__(self, vanishes_at: Stage | None = None, free_memory: int = 10**12) -> None:
        self.alive = [Node("a", 2, 0), Node("b", 2, 0)]
        self.ran: list[tuple[str, Stage, str | None]] = []
        self.most_transfers = 0
        self.jobs: list[int] = []
        self._vanishes_at = vanishes_at
        self._memory = free_memory
        self._flying: list[tuple[Step, Job, Node]] = []

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def probe(self, nodes: Sequence[Node]) -> dict[str, Facts]:
        facts = Facts(node="n", python="3", packages=PACKAGES, host_memory=self._memory, disk_free=10**12, cpus=2)
        return {node.id: facts for node in nodes}

    def start(self, step: Step, of: Job, node: Node, seconds: float) -> None:
        self._flying.append((step, of, node))
        if step.stage == Stage.FETCH:
            self.jobs.append(step.job)
        transfers = sum(other.stage in (Stage.FETCH, Stage.PUBLISH) for other, _, _ in self._flying)
        self.most_transfers = max(self.most_transfers, transfers)

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        if not self._flying:
            return []
        step, of, node = self._flying.pop(0)
        if step.stage == self._vanishes_at and node.id == "a" and node in self.alive:
            self.alive.remove(node)
        self.ran.append((node.id, step.stage, step.recipe))
        return [(step, self._result(step, of, node))]

    def _result(self, step: Step, of: Job, node: Node) -> StageResult:
        if node not in self.alive:
            return StageResult(stage=step.stage, recipe=step.recipe, failure=DIED)
        match step.stage:
            case Stage.FETCH:
                return StageResult(stage=Stage.FETCH)
            case Stage.QUANTIZE:
                return made(*(order.recipe.name for order in of.orders))
            case Stage.VERIFY:
                name = step.recipe or ""
                return StageResult(stage=Stage.VERIFY, recipe=name, manifest=manifest(of, name, accepted=True))
            case Stage.PUBLISH:
                return StageResult(stage=Stage.PUBLISH, recipe=step.recipe, commit="c")


def plan_of(count: int, *recipes: str, host_bytes: int = 0) -> Plan:
    jobs, cells = [], []
    for index in range(count):
        pin = ModelPin(id=f"org/model-{index}", revision="r")
        jobs.append(job(*recipes).model_copy(update={"model": pin}))
        cells += [PlannedArtifact(Source(pin, {}, ()), order, Estimate(0, 0, host_bytes)) for order in jobs[-1].orders]
    return Plan("test", tuple(cells), tuple(jobs))


def drive(cluster: ScriptedCluster, plan: Plan) -> Driver:
    driver = Driver(cluster, plan, [])  # type: ignore[arg-type]
    driver.run()
    return driver


def commits(driver: Driver) -> list[str | None]:
    return [artifact.commit for run in driver.jobs for artifact in run.artifacts.values()]


def test_jobs_are_spread_over_the_nodes_and_transfers_are_bounded() -> None:
    cluster = ScriptedCluster()
    driver = drive(cluster, plan_of(12, "bnb-nf4"))
    assert commits(driver) == ["c"] * 12
    assert {node for node, _, _ in cluster.ran} == {"a", "b"}
    assert 1 < cluster.most_transfers <= TRANSFERS


def test_a_job_whose_node_vanishes_begins_anew_on_another() -> None:
    for stage in (Stage.FETCH, Stage.QUANTIZE, Stage.VERIFY, Stage.PUBLISH):
        cluster = ScriptedCluster(vanishes_at=stage)
        driver = drive(cluster, plan_of(3, "bnb-nf4", "bnb-int8"))
        assert commits(driver) == ["c"] * 6, stage
        assert {run.node for run in driver.jobs} == {"b"} or stage == Stage.PUBLISH
        done = [entry for entry in cluster.ran if entry[1] == Stage.PUBLISH and entry[0] == "b"]
        assert len(done) <= 6


def test_a_job_that_fits_on_no_node_is_told_why_and_the_others_go_on() -> None:
    cluster = ScriptedCluster(free_memory=10**9)
    plan = plan_of(1, "bnb-nf4")
    large = plan_of(2, "bnb-nf4", host_bytes=10**10)
    mixed = Plan("test", (*plan.artifacts, *large.artifacts[1:]), (plan.jobs[0], large.jobs[1]))
    driver = drive(cluster, mixed)
    assert commits(driver) == ["c", None]
    failure = driver.jobs[1].artifacts["bnb-nf4"].failure
    assert failure is not None
    assert failure.kind == "PreflightError"
    assert "host memory: 1.0 GB" in failure.message
    assert "expected at least 10.0 GB" in failure.message


def test_without_a_node_that_answers_every_job_says_so() -> None:
    cluster = ScriptedCluster()
    cluster.alive = []
    driver = drive(cluster, plan_of(2, "bnb-nf4"))
    failures = [artifact.failure for run in driver.jobs for artifact in run.artifacts.values()]
    assert all(failure and "no node of the cluster answers" in failure.message for failure in failures)


def test_the_longest_jobs_go_first_and_their_work_is_balanced() -> None:
    plan = plan_of(5, "bnb-nf4")
    sizes = (1, 9, 2, 8, 4)
    cells = [
        PlannedArtifact(cell.source, cell.order, Estimate(0, 0, 0, pass_work=size * 10**9))
        for cell, size in zip(plan.artifacts, sizes, strict=True)
    ]
    cluster = ScriptedCluster()
    drive(cluster, Plan("test", tuple(cells), plan.jobs))
    nodes = [node for node, stage, _ in cluster.ran if stage == Stage.FETCH]
    fetched = [(node, sizes[index]) for node, index in zip(nodes, cluster.jobs, strict=True)]
    assert [size for _, size in fetched] == [9, 8, 4, 2, 1]
    loads = {node: sum(size for at, size in fetched if at == node) for node in ("a", "b")}
    assert loads == {"a": 12, "b": 12}


def test_a_stage_gets_as_long_as_its_work_takes_at_a_crawl() -> None:
    assert deadline_seconds(Stage.FETCH, 0, 0, 1, 0) == STARTING_SECONDS
    assert deadline_seconds(Stage.FETCH, 10**9, 0, 1, 0) > 4000
    slow, fast = (deadline_seconds(Stage.QUANTIZE, 0, 10**15, 4, gpus) for gpus in (0, 1))
    assert slow > 200_000 > fast > STARTING_SECONDS
