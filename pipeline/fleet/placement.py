"""Who fits where: what a node has free, what a stage needs of it, and which share of a card it gets. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.planning.sizing import Need
from workers.machine.preflight import MachineFacts

# Jobs on one card at most, and how much of its memory estimates may fill.
MOST_SHARES, USABLE = 8, 0.9


@dataclass(frozen=True)
class Node:
    """A Ray node that is alive; ``memory`` in bytes is what Ray lends there, 0 where it doesn't say."""

    id: str
    cpus: int
    gpus: int
    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def cpus_per_stage(self) -> int:
        """Threads of a computing stage, at most 8: a property of the node alone, for they can change the last bit."""
        return max(1, min(8, self.cpus // max(2, self.gpus)))

    @property
    def slots(self) -> int:
        """How many computing stages keep the node busy."""
        return self.gpus or max(1, self.cpus // self.cpus_per_stage)


@dataclass(frozen=True)
class Claim:
    """What a running stage holds of its node."""

    cpus: float
    memory: int
    gpus: float = 0.0
    card: int = -1
    alone: bool = False


class Room:
    """What is free on one node; ``free_disk`` counts what is promised to jobs as taken."""

    def __init__(self, node: Node, facts: MachineFacts) -> None:
        self.node = node
        self.facts = facts
        self.host_memory = min(facts.host_memory, node.memory or facts.host_memory)
        self.device_memory = int(min((device.memory for device in facts.devices), default=0) * USABLE)
        self.free_disk = facts.disk_free
        self.running = 0  # computing stages
        self._cpus = float(node.cpus)
        self._memory = self.host_memory
        self._cards = [1.0] * node.gpus

    @property
    def speed(self) -> float:
        """Of one of its slots, in units that only compare: a generation of cards does about twice as much in a
        multiprocessor as the one before."""
        if not self.facts.devices:
            return float(self.node.cpus_per_stage)
        return min(device.processors * 2.0 ** (device.capability[0] - 3) for device in self.facts.devices)

    @property
    def idle_cards(self) -> int:
        """Cards that nothing runs on."""
        return sum(free > 1 - 1e-9 for free in self._cards)

    def compute(self, need: Need, *, most: int = 1) -> Claim | None:
        """What a computing stage takes here: a whole card, or a part of one that so many at ``most`` share; None while
        there isn't room for it."""
        if need.host > self._memory:
            return None
        threads = self.node.cpus_per_stage
        if not self._cards:
            return Claim(threads, need.host) if threads <= self._cpus else None
        parts = min(self.parts(need), most)
        threads_of_part = threads / parts
        # The fullest card that still has a part free: whole ones stay whole.
        fitting = [(free, card) for card, free in enumerate(self._cards) if free >= 1 / parts - 1e-9]
        if not fitting or threads_of_part > self._cpus + 1e-9:
            return None
        return Claim(threads_of_part, need.host, 1 / parts, min(fitting)[1])

    def alone(self, need: Need) -> Claim | None:
        """The whole node, for a stage that ran out of memory beside others."""
        if self.running:
            return None
        return Claim(self.node.cpus_per_stage, max(need.host, self.host_memory), float(bool(self._cards)), 0, True)

    def transfer(self, need: Need) -> Claim | None:
        """What a stage takes that only moves bytes."""
        return Claim(0, need.host) if need.host <= self._memory else None

    def parts(self, need: Need) -> int:
        """How many stages of this need one card holds."""
        if not need.device or not self.device_memory:
            return 1
        return max(1, min(MOST_SHARES, self.device_memory // need.device))

    @property
    def idle_cpus(self) -> int:
        """Cores that no stage holds."""
        return int(self._cpus + 1e-9)

    def larger_than(self, other: Room) -> bool:
        """Whether there's more memory here: on the host or on the cards, and not less of either."""
        mine, theirs = (self.host_memory, self.device_memory), (other.host_memory, other.device_memory)
        return mine[0] >= theirs[0] and mine[1] >= theirs[1] and mine != theirs

    def roomier_than(self, other: Room) -> bool:
        """Whether there was more disk here to begin with."""
        return self.facts.disk_free > other.facts.disk_free

    def take(self, claim: Claim) -> None:
        """Count a claim as held."""
        self._change(claim, -1)

    def give(self, claim: Claim) -> None:
        """Count a claim as free again."""
        self._change(claim, 1)

    def _change(self, claim: Claim, sign: int) -> None:
        self.running -= sign * bool(claim.cpus)
        self._cpus += sign * claim.cpus
        self._memory += sign * claim.memory
        if claim.gpus and self._cards:
            self._cards[claim.card] += sign * claim.gpus


def lacking(room: Room, need: Need, disk: int, where: str) -> list[str]:
    """What the node could never give, whatever else ran there; ``where`` names the job and its folder."""
    node, found = room.facts.node, []
    if need.host > room.host_memory:
        found.append(
            f"host memory: {gigabytes(room.host_memory)} on {node}, expected at least {gigabytes(need.host)} for "
            f"{where}; lower calibration.samples, or use a larger machine"
        )
    if room.node.gpus and need.device > room.device_memory > 0:
        found.append(
            f"GPU memory: {gigabytes(room.device_memory)} usable of {room.facts.devices[0].name} on {node}, expected "
            f"at least {gigabytes(need.device)} for {where}; use a larger card"
        )
    if disk > room.facts.disk_free:
        found.append(
            f"disk: {gigabytes(room.facts.disk_free)} free on {node}, expected at least {gigabytes(disk)} for "
            f"{where}; free some, or choose another --out"
        )
    return found


def unmatched(labels: Mapping[str, str], selector: Mapping[str, str]) -> list[str]:
    """Which of Ray's label selectors a node doesn't meet: a value, ``!value``, ``in(a,b)`` or ``!in(a,b)``."""
    return [key for key, wanted in selector.items() if not _meets(labels.get(key), wanted)]


def _meets(value: str | None, wanted: str) -> bool:
    negated, rest = wanted.startswith("!"), wanted.removeprefix("!")
    several = rest.startswith("in(") and rest.endswith(")")
    allowed = [part.strip() for part in rest[3:-1].split(",")] if several else [rest]
    return (value in allowed) != negated


def gigabytes(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB"
