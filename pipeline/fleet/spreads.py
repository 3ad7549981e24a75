"""A pass that is spread over nodes: how far its parts are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.fleet.steps import Step
from workers.spec.job import Part


@dataclass
class Spread:
    """The pass of one job over several slots of its node: in three steps, each of whose parts have to be through."""

    whole: Step
    parts: int
    begun: float
    out: set[Step] = field(default_factory=set)
    host_bytes: int = 0
    device_bytes: int = 0

    def step(self, name: Literal["gather", "solve", "join"]) -> set[Step]:
        """All parts of a step."""
        count = 1 if name == "join" else self.parts
        self.out = {replace(self.whole, part=Part(step=name, index=i, of=self.parts)) for i in range(count)}
        return set(self.out)
