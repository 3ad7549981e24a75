"""Track the free cores, memory and GPU shares of a node, and claim them for stages. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.planning.sizing import Need
from workers.machine.preflight import MachineFacts

# Most stages that share one GPU, and the fraction of its memory that estimates may fill.
MOST_SHARES, USABLE = 8, 0.9
# Errors of one card after which nothing is placed on it any more.
FAULTS = 2
# Host bytes of a further GPU of a stage: its context and libraries, and the model's modules without weights. Assumed.
FURTHER_CARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Node:
    """A Ray node that is alive; ``memory`` is the bytes that Ray schedules there, 0 if unknown."""

    id: str
    cpus: int
    gpus: int
    memory: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def cpus_per_stage(self) -> int:
        """Threads of a computing stage, at most 8; depends on the node alone, as it can change a result's last bit."""
        return max(1, min(8, self.cpus // max(2, self.gpus)))

    @property
    def slots(self) -> int:
        """Number of computing stages that keep the node busy."""
        return self.gpus or max(1, self.cpus // self.cpus_per_stage)


@dataclass(frozen=True)
class Claim:
    """Resources that a running stage holds: cores, host bytes, and GPUs: a fraction of one, or several whole ones.

    ``cards`` are their indices on the node.
    """

    cpus: float
    memory: int
    gpus: float = 0.0
    cards: tuple[int, ...] = ()
    alone: bool = False


class Room:
    """Free resources of one node; ``free_disk`` (bytes) excludes what is reserved for its jobs."""

    def __init__(self, node: Node, facts: MachineFacts) -> None:
        self.node = node
        self.facts = facts
        self.host_memory = min(facts.host_memory, node.memory or facts.host_memory)
        self.device_memory = int(min((device.memory for device in facts.devices), default=0) * USABLE)
        self.free_disk = facts.disk_free
        self.running = 0  # number of computing stages
        self._cpus = float(node.cpus)
        self._memory = self.host_memory
        self._cards = [1.0] * node.gpus
        self._faults = [0] * node.gpus

    @property
    def speed(self) -> float:
        """Relative speed of one slot, in arbitrary units; assumes that each GPU generation doubles the speed of a
        multiprocessor."""
        if not self.facts.devices:
            return float(self.node.cpus_per_stage)
        return min(device.processors * 2.0 ** (device.capability[0] - 3) for device in self.facts.devices)

    @property
    def idle_cards(self) -> int:
        """Number of GPUs that nothing runs on."""
        return len(self._idle)

    @property
    def _idle(self) -> list[int]:
        return [card for card in self.usable_cards if self._cards[card] > 1 - 1e-9]

    def set_aside(self, card: int) -> bool:
        """Whether a GPU has failed too often to be used again."""
        return self._faults[card] >= FAULTS

    @property
    def usable_cards(self) -> list[int]:
        """The GPUs that aren't set aside, those that have failed least first."""
        return sorted(
            (card for card in range(len(self._cards)) if not self.set_aside(card)), key=self._faults.__getitem__
        )

    def card_failed(self, card: int) -> bool:
        """Count a GPU's failure; True if it is set aside from now on."""
        self._faults[card] += 1
        return self.set_aside(card)

    def compute(self, need: Need, *, most: int = 1) -> Claim | None:
        """Claim for a computing stage: a whole GPU, or a share of one that at most ``most`` stages share; None while
        there isn't room for it."""
        if need.host > self._memory:
            return None
        threads = self.node.cpus_per_stage
        if not self._cards:
            return Claim(threads, need.host) if threads <= self._cpus else None
        parts = min(self.parts(need), most)
        threads_of_part = threads / parts
        # Take the fullest GPU with a free share, so that idle GPUs stay whole; one that has failed comes last.
        fitting = [
            (self._faults[card], free, card)
            for card, free in enumerate(self._cards)
            if free >= 1 / parts - 1e-9 and not self.set_aside(card)
        ]
        if not fitting or threads_of_part > self._cpus + 1e-9:
            return None
        return Claim(threads_of_part, need.host, 1 / parts, (min(fitting)[2],))

    def several(self, need: Need, count: int) -> Claim | None:
        """Claim for a computing stage on so many idle GPUs, with the cores that belong to them; None while there aren't
        as many, or no room for it."""
        host, threads = need.host + (count - 1) * FURTHER_CARD_BYTES, count * self.node.cpus_per_stage
        if count > self.idle_cards or host > self._memory or threads > self._cpus + 1e-9:
            return None
        return Claim(threads, host, count, tuple(sorted(self._idle[:count])))

    def alone(self, need: Need) -> Claim | None:
        """Claim for the whole node, for a stage that ran out of memory beside others; None while something runs."""
        if self.running or (self._cards and not self.usable_cards):
            return None
        cards = tuple(self.usable_cards[:1])
        return Claim(self.node.cpus_per_stage, max(need.host, self.host_memory), float(len(cards)), cards, True)

    def transfer(self, need: Need) -> Claim | None:
        """Claim for a stage that only transfers files; None while memory doesn't suffice."""
        return Claim(0, need.host) if need.host <= self._memory else None

    def parts(self, need: Need) -> int:
        """Number of stages with this need that fit in one GPU's memory, at most ``MOST_SHARES``."""
        if not need.device or not self.device_memory:
            return 1
        return max(1, min(MOST_SHARES, self.device_memory // need.device))

    @property
    def idle_cpus(self) -> int:
        """Number of cores that no stage holds."""
        return int(self._cpus + 1e-9)

    def larger_than(self, other: Room) -> bool:
        """Whether this node has more host or GPU memory than the other, and not less of either."""
        mine, theirs = (self.host_memory, self.device_memory), (other.host_memory, other.device_memory)
        return mine[0] >= theirs[0] and mine[1] >= theirs[1] and mine != theirs

    def roomier_than(self, other: Room) -> bool:
        """Whether this node had more free disk than the other when it was probed."""
        return self.facts.disk_free > other.facts.disk_free

    def take(self, claim: Claim) -> None:
        """Subtract a claim from the free resources."""
        self._change(claim, -1)

    def give(self, claim: Claim) -> None:
        """Return a claim to the free resources."""
        self._change(claim, 1)

    def _change(self, claim: Claim, sign: int) -> None:
        self.running -= sign * bool(claim.cpus)
        self._cpus += sign * claim.cpus
        self._memory += sign * claim.memory
        for card in claim.cards:
            self._cards[card] += sign * claim.gpus / len(claim.cards)


def lacking(room: Room, need: Need, disk: int, where: str) -> list[str]:
    """Messages about what a job needs and the node lacks even if nothing else ran there; ``where`` names the job."""
    node, problems = room.facts.node, []
    if need.host > room.host_memory:
        problems.append(
            f"host memory: {gigabytes(room.host_memory)} on {node}, expected at least {gigabytes(need.host)} for "
            f"{where}; lower calibration.samples, or use a larger machine"
        )
    if room.node.gpus and need.least_device > room.device_memory > 0:
        problems.append(
            f"GPU memory: {gigabytes(room.device_memory)} usable of {room.facts.devices[0].name} on {node}, expected "
            f"at least {gigabytes(need.least_device)} for {where}; use a larger card"
        )
    if room.node.gpus and not room.facts.devices and not room.facts.cards:
        cuda = room.facts.torch_cuda
        torch = f"torch {room.facts.packages.get('torch')} (built {f'for CUDA {cuda}' if cuda else 'without CUDA'})"
        problems.append(
            f"GPU: Ray schedules {room.node.gpus} on {node}, but {torch} finds none, expected as many; "
            "install torch's CUDA build and the driver there, or start the node with --num-gpus 0"
        )
    if disk > room.facts.disk_free:
        problems.append(
            f"disk: {gigabytes(room.facts.disk_free)} free on {node}, expected at least {gigabytes(disk)} for "
            f"{where}; free some, or choose another --out"
        )
    return problems


def unmatched(labels: Mapping[str, str], selector: Mapping[str, str]) -> list[str]:
    """Keys of Ray's label selectors that a node doesn't match: a value, ``!value``, ``in(a,b)`` or ``!in(a,b)``."""
    return [key for key, wanted in selector.items() if not _meets(labels.get(key), wanted)]


def _meets(value: str | None, wanted: str) -> bool:
    negated, rest = wanted.startswith("!"), wanted.removeprefix("!")
    several = rest.startswith("in(") and rest.endswith(")")
    allowed = [part.strip() for part in rest[3:-1].split(",")] if several else [rest]
    return (value in allowed) != negated


def gigabytes(count: int) -> str:
    """Format bytes as GB (1e9)."""
    return f"{count / 1e9:.1f} GB"
