"""A pass that is spread over the slots of one node: whether it is worth it, and how far its parts are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.fleet.demand import Demand
from pipeline.fleet.placement import Room
from pipeline.fleet.steps import Step
from pipeline.planning.sizing import typical_seconds
from workers.spec.job import Part, PeakMemory, Stage, StageResult

PartStep = Literal["gather", "solve", "join"]
FOLLOWING: dict[str, PartStep] = {"gather": "solve", "solve": "join"}


def parts_for(step: Step, demand: Demand, room: Room, least_seconds: float) -> int:
    """Over how many slots of a node a stage is worth spreading; 1 where it isn't. Pure.

    Only a whole pass of ``least_seconds`` or more is, if its parts fit the host's memory and what they gather the disk.
    """
    node = room.node
    slots = room.idle_cards if node.gpus else room.idle_cpus // node.cpus_per_stage
    if step.stage != Stage.QUANTIZE or step.part is not None or slots < 2:
        return 1
    long = typical_seconds(demand.pass_work, node.cpus_per_stage, node.gpus) >= least_seconds
    holds = slots * demand.quantize.host <= room.host_memory and demand.gathered <= room.free_disk
    return slots if long and holds else 1


@dataclass
class Spread:
    """The pass of one job over several slots of its node: in three steps, each of whose parts have to be through."""

    whole: Step
    parts: int
    begun: float
    running: set[Step] = field(default_factory=set)
    memory: PeakMemory = field(default_factory=PeakMemory)

    def begin(self, name: PartStep) -> set[Step]:
        """All parts of a step, which are then running."""
        count = 1 if name == "join" else self.parts
        self.running = {replace(self.whole, part=Part(step=name, index=i, of=self.parts)) for i in range(count)}
        return set(self.running)

    def land(self, step: Step, result: StageResult) -> None:
        """A part has ended."""
        self.running.discard(step)
        peak = result.memory
        self.memory = PeakMemory(host=max(self.memory.host, peak.host), device=max(self.memory.device, peak.device))

    def through(self, step: Step) -> bool:
        """Whether the part that has ended was the last of the last step."""
        assert step.part is not None, "parts alone land here"
        return not self.running and step.part.step not in FOLLOWING

    def following(self, step: Step) -> set[Step]:
        """The parts that begin now that this one has ended: none while others of its step run."""
        assert step.part is not None, "parts alone land here"
        return set() if self.running else self.begin(FOLLOWING[step.part.step])
