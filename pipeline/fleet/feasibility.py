"""Which jobs of a plan fit nowhere, told before anything is started: on this machine, or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline import doctor
from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.sites import Fleet, Probed
from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan
from workers.errors import PreflightError
from workers.machine import environments, preflight
from workers.machine.preflight import MachineFacts
from workers.spec.job import Job, StageResult

CARD = Path("/dev/nvidia0")


def infeasible(plan: Plan, out: Path, address: str | None) -> list[str]:
    """A line for each job that fits on no node, with the numbers.

    Raises:
        ZooError: no Ray cluster at ``address``.
    """
    if address is None:
        return _judged(plan, ThisMachine(out))
    from pipeline.fleet.cluster import Cluster

    with Cluster(address, out.resolve()) as cluster:
        return _judged(plan, cluster)


def _judged(plan: Plan, fleet: Fleet) -> list[str]:
    return list(dict.fromkeys(message for _, message in Driver(fleet, plan, []).infeasible()))


class ThisMachine:
    """What the embedded Ray would have; starts nothing."""

    def __init__(self, out: Path) -> None:
        self._out = out
        # Looking at cards takes torch, in a process of its own.
        self._facts = doctor.facts(sys.executable, out) if CARD.exists() else preflight.probe(out, False)

    def nodes(self) -> list[Node]:
        """One."""
        facts = self._facts
        return [Node(facts.node, facts.cpus, len(facts.devices), facts.host_memory)]

    def probe(self, nodes: Sequence[Node], environments_: Iterable[str | None]) -> Probed:
        """As ``Fleet`` says."""
        found: dict[str | None, MachineFacts | str] = {}
        for name in environments_:
            try:
                found[name] = doctor.facts(environments.interpreter(name), self._out) if name else self._facts
            except PreflightError as error:
                found[name] = str(error)
        return {node.id: found for node in nodes}

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Never: this only judges."""
        raise NotImplementedError

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """Nothing was started."""
        return []
