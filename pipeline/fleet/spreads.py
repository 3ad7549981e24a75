"""Decide what a stage takes of a node where nothing else waits, and track the parts of a pass that is spread.

On cards one process computes on several, and nothing but the artifacts is written. On cores a long pass is spread over
processes, which share their inputs on the disk.
"""

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
    """Number of slots of a node without cards to spread a stage over; 1: don't spread. Pure.

    Only a whole pass of ``least_seconds`` or more is spread, if its parts fit host memory and their files the disk.
    """
    slots = 1 if room.node.gpus else room.idle_cpus // room.node.cpus_per_stage
    if step.stage != Stage.QUANTIZE or step.part is not None or slots < 2:
        return 1
    holds = slots * demand.quantize.host <= room.host_memory and demand.gathered <= room.free_disk
    return slots if holds and _is_long(demand, room, least_seconds) else 1


def cards_for(step: Step, demand: Demand, room: Room, idle: int, least_seconds: float) -> int:
    """Number of ``idle`` cards of a node that a computing stage has a use for; 1: for one, or none. Pure.

    A pass of ``least_seconds`` or more takes all; a verification as many as hold the whole artifact and an eighth more
    (``workers.verify.runtimes.place``), which its runtime otherwise loads on the CPU.
    """
    card = room.device_memory
    if step.stage == Stage.QUANTIZE:
        return max(1, idle) if _is_long(demand, room, least_seconds) else 1
    whole = demand.need(step.stage, step.recipe).device
    if not card or whole <= card:
        return 1
    cards = -(-(whole + whole // 8) // card)
    return cards if cards <= idle else 1


def _is_long(demand: Demand, room: Room, least_seconds: float) -> bool:
    return typical_seconds(demand.pass_work, room.node.cpus_per_stage, room.node.gpus) >= least_seconds


@dataclass
class Spread:
    """One job's pass, spread over several slots of its node in three steps; a step starts when the last has ended."""

    whole: Step
    parts: int
    begun: float
    running: set[Step] = field(default_factory=set)
    memory: PeakMemory = field(default_factory=PeakMemory)

    def begin(self, name: PartStep) -> set[Step]:
        """Mark all parts of a step as running, and return them."""
        count = 1 if name == "join" else self.parts
        self.running = {replace(self.whole, part=Part(step=name, index=i, of=self.parts)) for i in range(count)}
        return set(self.running)

    def land(self, step: Step, result: StageResult) -> None:
        """Record that a part has ended, and its peak memory."""
        self.running.discard(step)
        peak = result.memory
        self.memory = PeakMemory(host=max(self.memory.host, peak.host), device=max(self.memory.device, peak.device))

    def through(self, step: Step) -> bool:
        """Whether this ended part was the last one of the last step."""
        assert step.part is not None, "parts alone land here"
        return not self.running and step.part.step not in FOLLOWING

    def following(self, step: Step) -> set[Step]:
        """The parts of the next step after this one has ended; empty while other parts of its step run."""
        assert step.part is not None, "parts alone land here"
        return set() if self.running else self.begin(FOLLOWING[step.part.step])
