"""Find the jobs of a plan that fit on no node of this machine or a cluster, before anything starts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline import doctor, registry
from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.sites import Fleet, Probed
from pipeline.fleet.steps import Step
from pipeline.planning.plan import Plan
from workers.errors import PreflightError
from workers.machine import environments, preflight
from workers.machine.preflight import MachineFacts
from workers.spec.job import Job, StageResult
from workers.spec.recipes import Recipe

CARD = Path("/dev/nvidia0")


def infeasible(plan: Plan, out: Path, address: str | None) -> list[str]:
    """One line for each job that fits on no node, with what it needs and what the nodes have.

    Raises:
        ZooError: no Ray cluster at ``address``.
    """
    if address is None:
        return _judged(plan, ThisMachine(out, [order.recipe for job in plan.jobs for order in job.orders]))
    from pipeline.fleet.cluster import Cluster

    with Cluster(address, out.resolve()) as cluster:
        return _judged(plan, cluster)


def by_node(
    chosen: Sequence[Recipe], out: Path, address: str, runtimes: Sequence[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """What each node of a cluster lacks for each recipe, by recipe and node; nodes that don't answer are left out.

    Raises:
        ZooError: no Ray cluster at ``address``.
    """
    from pipeline.fleet.cluster import Cluster

    needed = {None, *(name for recipe in chosen for name in preflight.environments_of(recipe, runtimes))}
    with Cluster(address, out.resolve()) as cluster:
        probed = cluster.probe(cluster.nodes(), needed)
    return judged_by_node(chosen, probed, runtimes)


def judged_by_node(
    chosen: Sequence[Recipe], probed: Probed, runtimes: Sequence[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """See ``by_node``. Nodes have their host's name; where several have the same, with the beginning of Ray's id."""
    never = registry.ask(chosen).never
    known = {
        node: {
            name: one if isinstance(one, str) else one.model_copy(update={"refused": never})
            for name, one in facts.items()
        }
        for node, facts in probed.items()
    }
    hosts = {node: one.node for node, facts in known.items() if isinstance(one := facts.get(None), MachineFacts)}
    several = {host for host, count in Counter(hosts.values()).items() if count > 1}
    names = {node: f"{host} ({node[:8]})" if host in several else host for node, host in hosts.items()}
    return {
        recipe.name: {name: doctor.problems_of(known[node], recipe, runtimes) for node, name in names.items()}
        for recipe in chosen
    }


def _judged(plan: Plan, fleet: Fleet) -> list[str]:
    return list(dict.fromkeys(message for _, message in Driver(fleet, plan, []).infeasible()))


class ThisMachine:
    """A fleet of this machine alone, as the embedded Ray would see it; starts nothing."""

    def __init__(self, out: Path, recipes: Iterable[Recipe] = ()) -> None:
        self._out = out
        # By name: a zoo has each of its recipes once for each model.
        self._refused = registry.ask({recipe.name: recipe for recipe in recipes}.values()).here
        # Probing GPUs loads torch, so a separate process does it.
        facts = doctor.facts(sys.executable, out) if CARD.exists() else preflight.probe(out, False)
        self._facts = facts.model_copy(update={"refused": self._refused})

    def nodes(self) -> list[Node]:
        """This machine, as one node."""
        facts = self._facts
        return [Node(facts.node, facts.cpus, len(facts.devices), facts.host_memory)]

    def probe(self, nodes: Sequence[Node], environments_: Iterable[str | None]) -> Probed:
        """See ``Fleet.probe``."""
        facts_by_environment: dict[str | None, MachineFacts | str] = {}
        for name in environments_:
            try:
                facts_by_environment[name] = (
                    doctor.facts(environments.interpreter(name), self._out) if name else self._facts
                )
            except PreflightError as error:
                facts_by_environment[name] = str(error)
        return {node.id: facts_by_environment for node in nodes}

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Not supported: this fleet only judges."""
        raise NotImplementedError

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """Always empty: nothing was started."""
        return []
