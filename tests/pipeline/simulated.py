"""Simulate a fleet, to test the driver's real decisions in virtual time (seconds).

The simulation asserts that stages don't use more than a node has; stages on a node that is gone fail.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.sites import Probed
from pipeline.fleet.steps import NETWORK_STAGES, Step
from pipeline.planning.plan import Plan, PlannedArtifact
from pipeline.planning.sizing import Estimate, Need
from pipeline.planning.sources import PinnedModel
from tests.pipeline.fleet.test_decisions import job, made, manifest
from workers.machine.preflight import Device, MachineFacts
from workers.spec.job import Failure, Job, ModelPin, Stage, StageResult

GIB = 1024**3
PACKAGES = dict.fromkeys(
    (
        "torch",
        "transformers",
        "safetensors",
        "datasets",
        "huggingface_hub",
        "greenlet",
        "accelerate",
        "bitsandbytes",
        "compressed-tensors",
        "gptqmodel",
        "optimum",
    ),
    "99",
)
DIED = Failure(kind="WorkerDied", message="gone")

Seconds = Callable[[Step, Job, Node], float]
Fails = Callable[[Step, Job, Node, Claim], Failure | None]


def node(name: str, cpus: int = 2, gpus: int = 0, gib: int = 1000, **labels: str) -> Node:
    """A node with ``gib`` GiB of host memory."""
    return Node(name, cpus, gpus, gib * GIB, {key.replace("_", "/"): value for key, value in labels.items()})


@dataclass
class Used:
    """Resources that running stages use on a node: cores, bytes, and the share of each GPU."""

    cpus: float = 0.0
    memory: int = 0
    cards: Counter[int] = field(default_factory=Counter)


class Told:
    """Collects the failures that watchers are told of."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def started(self, *_: object) -> None:
        pass

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        if result.failure:
            self.failures.append(result.failure.message)


class SimulatedFleet:
    """Nodes whose stages take ``seconds(...)`` of virtual time, and fail if ``fails(...)`` returns a failure."""

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        seconds: Seconds = lambda step, job, node: 1.0,
        fails: Fails = lambda step, job, node, claim: None,
        disk: int = 10**15,
        card_gib: int | Callable[[Node], int] = 80,
        processors: Callable[[Node], int] = lambda node: 1,
    ) -> None:
        self.alive = {node.id: node for node in nodes}
        self.now = 0.0
        self.log: list[tuple[float, str, str, Step]] = []  # time, "started" or "ended", node, step
        self.claims: dict[Step, Claim] = {}
        self.most = Counter[tuple[str, Stage]]()
        self.lean: set[Step] = set()
        self.disks = defaultdict(lambda: disk)
        self._card_gib, self._processors = card_gib, processors
        self._seconds, self._fails = seconds, fails
        self._used: defaultdict[str, Used] = defaultdict(Used)
        self._running = Counter[tuple[str, Stage]]()
        self._flying: list[tuple[float, int, Step, Job, Node, Claim]] = []
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Schedule an action, such as adding or removing a node, at a virtual time."""
        heapq.heappush(self._events, (when, next(self._order), action))

    def vanish(self, name: str) -> None:
        """Remove a node; the stages that run there end now."""
        self.alive.pop(name, None)
        lost = [entry for entry in self._flying if entry[4].id == name]
        self._flying = [entry for entry in self._flying if entry[4].id != name]
        self._flying += [(self.now, *entry[1:]) for entry in lost]
        heapq.heapify(self._flying)

    def nodes(self) -> list[Node]:
        return list(self.alive.values())

    def probe(self, nodes: Sequence[Node], environments: Iterable[str | None]) -> Probed:
        wanted = list(environments)
        return {node.id: {name: self._facts(node) for name in wanted} for node in nodes}

    def _facts(self, node: Node) -> MachineFacts:
        gib = self._card_gib if isinstance(self._card_gib, int) else self._card_gib(node)
        card = Device(name="card", capability=(9, 0), memory=gib * GIB, processors=self._processors(node))
        devices = (card,) * node.gpus
        return MachineFacts(
            node=node.id, python="3", packages=PACKAGES, devices=devices, host_memory=node.memory,
            disk_free=self.disks[node.id], cpus=node.cpus,
        )  # fmt: skip

    def start(self, step: Step, of: Job, node: Node, claim: Claim, seconds: float) -> None:
        self._change(node, claim, 1)
        self.log.append((self.now, "started", node.id, step))
        self.claims[step] = claim
        if claim.alone:
            self.lean.add(step)
        self._running[node.id, step.stage] += 1
        self.most[node.id, step.stage] = max(self.most[node.id, step.stage], self._running[node.id, step.stage])
        ends = self.now + (self._seconds(step, of, node) if node.id in self.alive else 0.0)
        heapq.heappush(self._flying, (ends, next(self._order), step, of, node, claim))

    def _change(self, node: Node, claim: Claim, sign: int) -> None:
        used = self._used[node.id]
        used.cpus += sign * claim.cpus
        used.memory += sign * claim.memory
        for card in claim.cards:
            used.cards[card] += sign * claim.gpus / len(claim.cards)  # type: ignore[assignment]
        if sign > 0 and not claim.alone:
            assert used.cpus <= node.cpus + 1e-6, f"{node.id} has {node.cpus} cores, {used.cpus} are taken"
            assert used.memory <= node.memory, f"{node.id} has {node.memory} bytes, {used.memory} are taken"
            assert max(used.cards.values(), default=0) <= 1 + 1e-6, f"{node.id}: a card is taken more than once"
            assert (claim.gpus > 0) == bool(claim.cards)
            assert all(card < node.gpus for card in claim.cards)

    def sleep(self, seconds: float) -> None:
        """Advance the virtual time; no stage ends meanwhile."""
        self._pass_to(self.now + seconds)

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        ends = self._flying[0][0] if self._flying else self.now + seconds
        event = self._events[0][0] if self._events else ends
        self._pass_to(max(self.now, min(ends, event, self.now + seconds)))
        done = []
        while self._flying and self._flying[0][0] <= self.now:
            _, _, step, of, node, claim = heapq.heappop(self._flying)
            self._change(node, claim, -1)
            self._running[node.id, step.stage] -= 1
            self.log.append((self.now, "ended", node.id, step))
            done.append((step, self._result(step, of, node, claim)))
        return done

    def _pass_to(self, when: float) -> None:
        while self._events and self._events[0][0] <= when:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = max(self.now, when)

    def _result(self, step: Step, of: Job, node: Node, claim: Claim) -> StageResult:
        gone = None if node.id in self.alive else DIED
        if failure := gone or self._fails(step, of, node, claim):
            return StageResult(stage=step.stage, recipe=step.recipe, failure=failure)
        match step.stage:
            case Stage.FETCH:
                return StageResult(stage=Stage.FETCH)
            case Stage.QUANTIZE if step.part and step.part.step != "join":
                return StageResult(stage=Stage.QUANTIZE)
            case Stage.QUANTIZE:
                return made(*(order.recipe.name for order in of.orders))
            case Stage.KEEP:
                return StageResult(stage=Stage.KEEP, recipe=step.recipe)
            case Stage.VERIFY:
                name = step.recipe or ""
                return StageResult(stage=Stage.VERIFY, recipe=name, manifest=manifest(of, name, accepted=True))
            case Stage.PUBLISH:
                return StageResult(stage=Stage.PUBLISH, recipe=step.recipe, commit="c")

    def order_of(self, stage: Stage, what: str = "started") -> list[int]:
        """Jobs in the order in which their stage was started (or ended)."""
        return [step.job for _, event, _, step in self.log if event == what and step.stage == stage]


def plan_of(sizes: Sequence[Estimate], *recipes: str) -> Plan:
    """A plan with one job per estimate, each with all recipes."""
    jobs, cells = [], []
    for index, size in enumerate(sizes):
        pin = ModelPin(id=f"org/model-{index}", revision="r")
        jobs.append(job(*recipes).model_copy(update={"model": pin}))
        cells += [PlannedArtifact(PinnedModel(pin, {}, (), "model"), order, size) for order in jobs[-1].orders]
    return Plan("simulated", tuple(cells), tuple(jobs))


def size(work: int = 0, *, host: int = 0, device: int = 0, disk: int = 0) -> Estimate:
    """An estimate whose quantizing and verifying need the same memory; ``work`` in multiply-adds, the rest in bytes."""
    need = Need(host, device)
    return Estimate(0, disk, need, need, pass_work=work)


def drive(fleet: SimulatedFleet, plan: Plan, spread_seconds: float = math.inf) -> Driver:
    """Run the plan in virtual time; by default passes aren't spread."""
    driver = Driver(fleet, plan, [], clock=lambda: fleet.now, sleep=fleet.sleep, spread_seconds=spread_seconds)
    driver.run()
    return driver


def commits(driver: Driver) -> list[str | None]:
    """The commit of every artifact, None if it wasn't published."""
    return [artifact.commit for run in driver.jobs for artifact in run.artifacts.values()]


def computing(step: Step) -> bool:
    """Whether a step computes, which takes a slot."""
    return step.stage not in NETWORK_STAGES
