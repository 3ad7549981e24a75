"""The nodes of a fleet as the driver sees them, and what it asks of a fleet."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.fleet.demand import Demand
from pipeline.fleet.placement import Claim, Node, Room, lacking, unmatched
from pipeline.fleet.retry import Choices, RetryMode
from pipeline.fleet.steps import JobRun, Step
from workers.machine import preflight
from workers.machine.preflight import MachineFacts
from workers.spec.job import Job, Stage, StageResult
from workers.spec.recipes import Recipe

# How many jobs are looked at for one whose files fit the disk.
LOOK_AHEAD = 64

Probed = dict[str, dict[str | None, MachineFacts | str]]


class RunWatcher(Protocol):
    """Who wants to know how a run goes: the progress display, the ledger."""

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """A step was handed to a node."""

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """A step came back; ``retry_in`` is the wait in seconds if it is tried again."""


class Fleet(Protocol):
    """What carries the decisions out: a Ray cluster, or a simulated one."""

    def nodes(self) -> list[Node]:
        """The nodes that are alive now."""

    def probe(self, nodes: Sequence[Node], environments: Iterable[str | None]) -> Probed:
        """What each node has, by node id and environment, or why that can't be used; None is the driver's own.

        Nodes that don't answer are left out.
        """

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Start a step, which is ended after so many seconds."""

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """The steps that ended, waiting for the first at most so long."""


@dataclass
class Site:
    """A node, what is placed there, and what is ready to start."""

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
        """Of all of its slots together."""
        return self.room.speed * self.room.node.slots

    @property
    def relative_load(self) -> float:
        """How long what it was given takes."""
        return self.load / self.speed

    @property
    def wants_more(self) -> bool:
        """Whether another model should be on its way here: there's one for each slot at most."""
        return len(self.backlog) < self.room.node.slots


def kind_of(room: Room, facts: dict[str | None, MachineFacts | str]) -> object:
    """What a node has in common with those that the same jobs fit."""
    node = room.node
    packages = tuple(
        (name, found if isinstance(found, str) else tuple(sorted(found.packages.items())))
        for name, found in sorted(facts.items(), key=str)
    )
    labels = tuple(sorted(entry for entry in node.labels.items() if entry[0] != "ray.io/node-id"))
    return node.cpus, node.gpus, room.host_memory >> 28, room.facts.devices, labels, packages


def environment(job: Job) -> str | None:
    """The prebuilt environment that a job's stages run in; None: the driver's own."""
    return job.orders[0].recipe.environment


class Sites:
    """The nodes of a fleet, and the jobs that wait for one: which job goes to which node next. Starts nothing.

    Nodes that the same jobs fit are of one kind, and each kind has a queue of its own.
    """

    def __init__(self, jobs: Sequence[JobRun], demands: Sequence[Demand]) -> None:
        self._jobs, self._demands = jobs, demands
        self._by_name: dict[str, Site] = {}
        self._kinds: dict[object, int] = {}
        self._members: dict[int, list[str]] = {}
        self._lacks: dict[tuple[int, str], list[str]] = {}
        self._fastest: dict[int, float] = {}  # speed of the fastest node that a job fits
        self._queues: dict[int, list[tuple[int, int, int]]] = {}
        self._outgrown: dict[int, tuple[RetryMode, Room]] = {}  # where a job ran out of memory or disk
        self.queued: set[int] = set()
        self.speed = 1.0

    def __getitem__(self, name: str) -> Site:
        return self._by_name[name]

    def get(self, name: str) -> Site | None:
        """The node of that name, if it's alive."""
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
        """The environments that any job needs, and the driver's own."""
        return sorted({None, *(environment(run.job) for run in self._jobs)}, key=str)

    # ------------------------------------------------------------------------------------------- nodes

    def add(self, nodes: Mapping[str, Node], probed: Probed) -> bool:
        """Add nodes that were probed; True if there are other kinds of nodes now: jobs have to be queued anew."""
        first = not self._by_name
        for name, facts in probed.items():
            if isinstance(own := facts.get(None), MachineFacts):
                room = Room(nodes[name], own)
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

    def remove(self, name: str) -> None:
        """Forget a node that is gone."""
        del self._by_name[name]

    # -------------------------------------------------------------------------------------------- jobs

    def offer(self, index: int) -> list[str] | None:
        """Queue a job at each kind of nodes that it fits: first those with the least choice, then the longest.

        Returns what all nodes lack if it fits none, and else None.
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
        """All that a node lacks for a job, whatever else runs there."""
        job, demand, room = self._jobs[index].job, self._demands[index], site.room
        node, facts = room.facts.node, site.facts.get(environment(job), "no answer")
        if isinstance(facts, str):
            return [f"{node}: {facts}"]
        lines = [line for order in job.orders for line in self._lacks_for(site, order.recipe, facts)]
        lines += lacking(room, demand.largest, demand.disk, f"{job.model.id!r}")
        mode, outgrown = self._outgrown.get(index, (RetryMode.SAME, room))
        if mode is RetryMode.LARGER and not room.larger_than(outgrown):
            lines.append(f"memory: no more on {node} than on {outgrown.facts.node}, where it ran out")
        return list(dict.fromkeys(lines))

    def _lacks_for(self, site: Site, recipe: Recipe, facts: MachineFacts) -> list[str]:
        """What nodes of this kind lack for a recipe, whatever the model: packages, capabilities, labels."""
        key = site.kind, recipe.name
        if key not in self._lacks:
            labels = site.room.node.labels
            self._lacks[key] = preflight.problems(facts, recipe) + [
                f"label {name} of {facts.node}: got {labels.get(name)!r}, expected {recipe.labels[name]!r} for recipe "
                f"{recipe.name!r}"
                for name in unmatched(labels, recipe.labels)
            ]
        return self._lacks[key]

    def next_job(self, site: Site, horizon: float) -> int | None:
        """Take the first job in a node's queue whose files fit its disk now, and that won't be the last to end.

        ``horizon``: how long all of the cluster takes for what is left.
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
                continue  # a faster node has it in its queue; what's left only gets less
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
        """A job ran out of memory (``LARGER``) or disk (``ROOMIER``) on a node: only nodes with more of it fit now."""
        self._outgrown[index] = mode, self._by_name[name].room

    def choices(self, index: int, name: str) -> Choices:
        """What other nodes have to offer to a job that ran out of something on this one."""
        here = self._by_name.get(name)
        if here is None:
            return Choices()
        fitting = {kind for kind, names in self._members.items() if not self.problems(index, self._by_name[names[0]])}
        others = [site.room for site in self._by_name.values() if site.kind in fitting]
        return Choices(
            larger=any(other.larger_than(here.room) for other in others),
            roomier=any(other.roomier_than(here.room) for other in others),
        )
