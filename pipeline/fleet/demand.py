"""What the jobs of a plan ask of a node: memory by stage, disk, and how much there is to compute."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pipeline.fleet.steps import NETWORK_STAGES
from pipeline.planning.plan import Plan, PlannedArtifact
from pipeline.planning.sizing import Need
from workers.spec.job import Job, Stage

# A process that moves files, without torch; measured 0.15 GB.
TRANSFER = Need(220_000_000)


@dataclass(frozen=True)
class Demand:
    """Memory of one job's stages, its bytes on disk, and its multiply-adds."""

    quantize: Need
    verify: dict[str, Need]  # by recipe
    disk: int
    source_bytes: int
    pass_work: int
    own_work: int
    gathered: int  # bytes on the disk, while the pass is spread over workers

    @property
    def work(self) -> int:
        """What the job weighs; one without an estimate weighs something, too."""
        return self.pass_work + self.own_work + 1

    @property
    def largest(self) -> Need:
        """What its dearest stage needs."""
        needs = [TRANSFER, self.quantize, *self.verify.values()]
        return Need(max(need.host for need in needs), max(need.device for need in needs))

    def need(self, stage: Stage, recipe: str | None) -> Need:
        """What one of its stages needs."""
        if stage in NETWORK_STAGES:
            return TRANSFER
        return self.quantize if stage == Stage.QUANTIZE else self.verify[recipe or ""]


def demands(plan: Plan) -> list[Demand]:
    """The demand of each of a plan's jobs."""
    cells: defaultdict[object, dict[str, PlannedArtifact]] = defaultdict(dict)
    for cell in plan.artifacts:
        cells[cell.source.pin][cell.order.recipe.name] = cell
    return [_demand(job, [cells[job.model][order.recipe.name] for order in job.orders]) for job in plan.jobs]


def _demand(job: Job, cells: list[PlannedArtifact]) -> Demand:
    made = [cell.estimate for cell in cells]
    source = made[0].source_bytes if job.model.folder is None else 0
    written = sum(estimate.artifact_bytes + estimate.spool_bytes for estimate in made)
    return Demand(
        quantize=Need(
            max(estimate.quantize.host for estimate in made), max(estimate.quantize.device for estimate in made)
        ),
        verify={cell.order.recipe.name: cell.estimate.verify for cell in cells},
        disk=source + written + max(estimate.state_bytes for estimate in made),
        source_bytes=made[0].source_bytes,
        pass_work=max(estimate.pass_work for estimate in made),
        own_work=sum(estimate.own_work for estimate in made),
        gathered=max(estimate.gathered_bytes for estimate in made),
    )
