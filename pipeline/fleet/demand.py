"""Compute what each job of a plan needs from a node: memory by stage, disk, and multiply-adds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pipeline.fleet.steps import NETWORK_STAGES
from pipeline.planning.plan import Plan, PlannedArtifact
from pipeline.planning.sizing import Need
from workers.spec.job import Job, Stage

# Host bytes of a process that moves files, without torch; measured 0.15 GB.
TRANSFER = Need(220_000_000)


@dataclass(frozen=True)
class Demand:
    """One job's memory by stage, its bytes on disk, and its work in multiply-adds."""

    quantize: Need
    verify: dict[str, Need]  # by recipe
    disk: int
    source_bytes: int
    pass_work: int
    own_work: int
    gathered: int  # bytes on disk, while the pass is spread over workers

    @property
    def work(self) -> int:
        """Weight of the job for scheduling, in multiply-adds; at least 1, also without an estimate."""
        return self.pass_work + self.own_work + 1

    @property
    def largest(self) -> Need:
        """Peak bytes over all stages, for host and device separately."""
        needs = [TRANSFER, self.quantize, *self.verify.values()]
        return Need(
            max(need.host for need in needs),
            max(need.device for need in needs),
            max(need.least_device for need in needs),
        )

    def need(self, stage: Stage, recipe: str | None) -> Need:
        """Peak bytes of one stage."""
        if stage in NETWORK_STAGES:
            return TRANSFER
        return self.quantize if stage == Stage.QUANTIZE else self.verify[recipe or ""]


def demands(plan: Plan) -> list[Demand]:
    """The demand of each job of a plan, in the plan's order."""
    cells: defaultdict[object, dict[str, PlannedArtifact]] = defaultdict(dict)
    for cell in plan.artifacts:
        cells[cell.source.pin][cell.order.recipe.name] = cell
    return [_demand(job, [cells[job.model][order.recipe.name] for order in job.orders]) for job in plan.jobs]


def _demand(job: Job, cells: list[PlannedArtifact]) -> Demand:
    estimates = [cell.estimate for cell in cells]
    source = estimates[0].source_bytes if job.model.folder is None else 0
    written = sum(estimate.artifact_bytes + estimate.spool_bytes for estimate in estimates)
    return Demand(
        quantize=Need(
            max(estimate.quantize.host for estimate in estimates),
            max(estimate.quantize.device for estimate in estimates),
            max(estimate.quantize.least_device for estimate in estimates),
        ),
        verify={cell.order.recipe.name: cell.estimate.verify for cell in cells},
        disk=source + written + max(estimate.state_bytes for estimate in estimates),
        source_bytes=estimates[0].source_bytes,
        pass_work=max(estimate.pass_work for estimate in estimates),
        own_work=sum(estimate.own_work for estimate in estimates),
        gathered=max(estimate.gathered_bytes for estimate in estimates),
    )
