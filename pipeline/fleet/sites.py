"""The nodes of a fleet as the driver sees them, and what it asks of a fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.fleet.placement import Claim, Node, Room
from pipeline.fleet.steps import Step
from workers.machine.preflight import MachineFacts
from workers.spec.job import Job, Stage, StageResult

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
    return job.orders[0].recipe.environment
