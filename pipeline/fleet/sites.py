"""Match waiting jobs to the nodes of a fleet, and define the protocols between driver, fleet and watchers."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.fleet.demand import Demand
from pipeline.fleet.placement import FAULTS, Claim, Node, Room, lacking, unmatched
from pipeline.fleet.retry import Choices, RetryMode
from pipeline.fleet.steps import JobRun, Step
from workers.machine import preflight
from workers.machine.preflight import MachineFacts
from workers.spec.job import Job, Order, Stage, StageResult

# Most queued jobs examined for one whose files fit a node's free disk.
LOOK_AHEAD = 64

Probed = dict[str, dict[str | None, MachineFacts | str]]


class RunWatcher(Protocol):
    """An observer of a run, such as the progress display or the ledger."""

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Called when a step was handed to a node."""

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Called when a step ended; ``retry_in`` is the wait in seconds before its retry, None if there is none."""


class Fleet(Protocol):
    """What executes the driver's decisions: a Ray cluster, or a simulated one."""

    def nodes(self) -> list[Node]:
        """The nodes that are alive now."""

    def probe(self, nodes: Sequence[Node], environments: Iterable[str | None]) -> Probed:
        """Facts of each node, by node id and environment (None: the driver's own), or why the environment is unusable.

        Nodes that don't answer are left out.
        """

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Start a step; it is killed after ``seconds``, its deadline."""

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """The steps that ended, after waiting at most ``seconds`` for the first."""


@dataclass
class Site:
    """A node, the jobs placed there, and the steps ready to start."""

    room: Room
    facts: dict[str | None, MachineFacts | str]
    kind: int
    load: int = 0
    backlog: set[int] = field(default_factory=set)  # jobs that haven't begun to compute
    ready: list[tuple[int, int, int, Step]] = field(default_factory=list)
    transfers: Counter[Stage] = field(default_factory=Counter)
    passed_over: int = 0

    @property
    def speed(self) -> float:
        """Relative speed of all slots together."""
        return self.room.speed * self.room.node.slots

    @property
    def relative_load(self) -> float:
        """Time that the node's jobs take on it, in the units of work and speed."""
        return self.load / self.speed

    @property
    def wants_more(self) -> bool:
        """Whether another model should be fetched here: at most one job per slot waits to compute."""
        return len(self.backlog) < self.room.node.slots


def kind_of(room: Room, facts: dict[str | None, MachineFacts | str]) -> object:
    """Key of a node's kind: nodes of one kind fit the same jobs."""
    node = room.node
    packages = tuple(
        (
            name,
            facts_or_problem if isinstance(facts_or_problem, str) else tuple(sorted(facts_or_problem.packages.items())),
        )
        for name, facts_or_problem in sorted(facts.items(), key=str)
    )
    labels = tuple(sorted(entry for entry in node.labels.items() if entry[0] != "ray.io/node-id"))
    return node.cpus, node.gpus, room.host_memory >> 28, room.facts.devices, labels, packages


def environment(job: Job) -> str | None:
    """The prebuilt environment that a job's stages run in; None for the driver's own."""
    return job.orders[0].recipe.environment


class Sites:
    """The nodes of a fleet and the queued jobs; chooses the next job for a node. Starts nothing.

    Nodes that fit the same jobs are of one kind; each kind has its own queue.
    """

    def __init__(self, jobs: Sequence[JobRun], demands: Sequence[Demand]) -> None:
        self._jobs, self._demands = jobs, demands
        self._by_name: dict[str, Site] = {}
        self._kinds: dict[object, int] = {}
        self._members: dict[int, list[str]] = {}
        self._lacks: dict[tuple[int, str], list[str]] = {}
        self._fastest: dict[int, float] = {}  # by job: speed of the fastest node that it fits
        self._queues: dict[int, list[tuple[int, int, int]]] = {}
        self._outgrown: dict[
            int, tuple[RetryMode, Room]
        ] = {}  # by job: what it ran out of (memory or disk), and on which node
        self.queued: set[int] = set()
        self.shunned: dict[str, str] = {}  # nodes whose every card is set aside, and what to say of them
        self.speed = 1.0

    def __getitem__(self, name: str) -> Site:
        return self._by_name[name]

    def get(self, name: str) -> Site | None:
        """The node of that name, or None if it isn't alive."""
        return self._by_name.get(name)

    def all(self) -> Iterable[Site]:
        """All nodes."""
        return self._by_name.values()

    @property
    def names(self) -> set[str]:
        """The names of all nodes."""
        return set(self._by_name)

    @property
    def environments(self) -> list[str | None]:
        """The environments that jobs need, and the driver's own (None)."""
        needs = {order.recipe.name: order for run in self._jobs for order in run.job.orders}
        named = {name for o in needs.values() for name in preflight.environments_of(o.recipe, o.runtimes)}
        return [None, *sorted(named)]

    # ------------------------------------------------------------------------------------------- nodes

    def add(self, nodes: Mapping[str, Node], probed: Probed) -> bool:
        """Add probed nodes; True if the kinds of nodes changed, so that all jobs must be queued again."""
        first = not self._by_name
        for name, facts in probed.items():
            if isinstance(driver_facts := facts.get(None), MachineFacts):
                room = Room(nodes[name], driver_facts)
                kind = self._kinds.setdefault(kind_of(room, facts), len(self._kinds))
                self._by_name[name] = Site(room, facts, kind)
        before, self._members = set(self._members), {}
        for name, site in self._by_name.items():
            self._members.setdefault(site.kind, []).append(name)
        self.speed = sum(site.speed for site in self._by_name.values())
        changed = first or before != set(self._members)
        if changed:
            self._queues = {kind: [] for kind in self._members}
        return changed

    def card_failed(self, name: str, claim: Claim) -> str:
        """Record that the card of a claim failed; what to say of it, empty if it may be used again.

        Of several cards it isn't known which failed, so none is blamed; the stage is tried again on one. A node without
        a card left is shunned: its CPU would take days for what was planned on a GPU.
        """
        site = self._by_name.get(name)
        if len(claim.cards) > 1:
            return f"one of cards {', '.join(map(str, claim.cards))}, which isn't known; next: on one card"
        if site is None or not claim.cards or not site.room.card_failed(claim.cards[0]):
            return ""
        node, cards = site.room.facts.node, site.room.node.gpus
        said = f"card {claim.cards[0]} of {node} is set aside, for it failed {FAULTS} times"
        if not site.room.usable_cards:
            self.shunned[name] = f"GPU: all {cards} of {node} are set aside, for they failed {FAULTS} times each"
        return said

    def remove(self, name: str) -> None:
        """Remove a node that is gone."""
        del self._by_name[name]

    # -------------------------------------------------------------------------------------------- jobs

    def offer(self, index: int) -> list[str] | None:
        """Queue a job at each kind of node that it fits; queues order jobs by fewest fitting kinds, then most work.

        Returns what the nodes lack if it fits none, else None.
        """
        lacks_by_kind = {kind: self.problems(index, self._by_name[names[0]]) for kind, names in self._members.items()}
        fitting = [kind for kind, lacks in lacks_by_kind.items() if not lacks]
        if not fitting:
            self.queued.discard(index)
            return [line for lines in lacks_by_kind.values() for line in lines]
        self.queued.add(index)
        self._fastest[index] = max(self._by_name[self._members[kind][0]].room.speed for kind in fitting)
        for kind in fitting:
            heapq.heappush(self._queues[kind], (len(fitting), -self._demands[index].work, index))
        return None

    def problems(self, index: int, site: Site) -> list[str]:
        """Messages about what a node lacks for a job, even if nothing else ran there."""
        job, demand, room = self._jobs[index].job, self._demands[index], site.room
        node, facts = room.facts.node, site.facts.get(environment(job), "no answer")
        if isinstance(facts, str):
            return [f"{node}: {facts}"]
        lines = [line for order in job.orders for line in self._lacks_for(site, order, facts)]
        lines += lacking(room, demand.largest, demand.disk, f"{job.model.id!r}")
        mode, outgrown = self._outgrown.get(index, (RetryMode.SAME, room))
        if mode is RetryMode.LARGER and not room.larger_than(outgrown):
            lines.append(f"memory: no more on {node} than on {outgrown.facts.node}, where it ran out")
        return list(dict.fromkeys(lines))

    def unmakeable(self, index: int) -> dict[str, list[str]]:
        """The recipes of a job that no node can make or check, and what the nodes lack for each."""
        job = self._jobs[index].job
        firsts = [self._by_name[names[0]] for names in self._members.values()]
        known = [(site, facts) for site in firsts if not isinstance(facts := site.facts.get(environment(job), ""), str)]
        lacks = {o.recipe.name: [self._lacks_for(site, o, facts) for site, facts in known] for o in job.orders}
        return {
            name: list(dict.fromkeys(line for lines in by_kind for line in lines))
            for name, by_kind in lacks.items()
            if by_kind and all(by_kind)
        }

    def _lacks_for(self, site: Site, order: Order, facts: MachineFacts) -> list[str]:
        """What nodes of this kind lack for a recipe with any model: environments, packages, labels and more. Cached."""
        recipe = order.recipe
        key = site.kind, recipe.name
        if key not in self._lacks:
            labels = site.room.node.labels
            self._lacks[key] = preflight.problems(facts, recipe, order.runtimes) + [
                f"label {name} of {facts.node}: got {labels.get(name)!r}, expected {recipe.labels[name]!r} for recipe "
                f"{recipe.name!r}"
                for name in unmatched(labels, recipe.labels)
            ]
            needed = sorted(preflight.environments_of(recipe, order.runtimes))
            answers = [site.facts.get(name, "no answer") for name in needed]
            self._lacks[key] += [f"{facts.node}: {problem}" for problem in answers if isinstance(problem, str)]
        return self._lacks[key]

    def next_job(self, site: Site, horizon: float) -> int | None:
        """Take the first job of a node's queue whose files fit its disk now and which it finishes before ``horizon``.

        ``horizon`` is the time in which the whole cluster finishes the remaining work, in units of work over speed. On
        the fastest kind of node for a job, the horizon doesn't matter.
        """
        queue = self._queues.get(site.kind, [])
        chosen: int | None = None
        set_aside: list[tuple[int, int, int]] = []
        while queue and chosen is None and len(set_aside) < LOOK_AHEAD:
            entry = heapq.heappop(queue)
            index = entry[2]
            if index not in self.queued:
                continue
            speed = site.room.speed
            until = site.relative_load + self._demands[index].work / speed
            if speed < self._fastest[index] and until > horizon:
                continue  # drop the entry: a faster node also has this job in its queue, and the horizon only shrinks
            if self._files_fit(index, site.room):
                chosen = index
            else:
                set_aside.append(entry)
        for entry in set_aside:
            heapq.heappush(queue, entry)
        return chosen

    def _files_fit(self, index: int, room: Room) -> bool:
        mode, outgrown = self._outgrown.get(index, (RetryMode.SAME, room))
        enough = mode is not RetryMode.ROOMIER or room.roomier_than(outgrown)
        return enough and self._demands[index].disk <= room.free_disk

    def outgrew(self, index: int, mode: RetryMode, name: str) -> None:
        """Record that a job ran out of memory (``LARGER``) or disk (``ROOMIER``) on a node; it needs one with more."""
        self._outgrown[index] = mode, self._by_name[name].room

    def choices(self, index: int, name: str) -> Choices:
        """Whether other nodes that a job fits have more memory or disk than this one, where it ran out."""
        site = self._by_name.get(name)
        if site is None:
            return Choices()
        fitting = {kind for kind, names in self._members.items() if not self.problems(index, self._by_name[names[0]])}
        others = [other.room for other in self._by_name.values() if other.kind in fitting]
        return Choices(
            larger=any(other.larger_than(site.room) for other in others),
            roomier=any(other.roomier_than(site.room) for other in others),
        )
