"""A stage takes several cards of its node where they would be idle, and none that others wait for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.fleet.placement import FURTHER_CARD_BYTES, Claim, Node, Room
from pipeline.fleet.scheduler import Driver, Pulse
from pipeline.fleet.steps import Step
from pipeline.planning.sizing import Estimate, Need
from tests.pipeline.simulated import GIB, SimulatedFleet, Told, commits, drive, node, plan_of, size
from workers.machine.preflight import MachineFacts
from workers.spec.job import Failure, Job, Stage

LONG = size(10**15)
LOST = Failure(kind="DeviceLost", message="the GPU failed")
ALL = (0, 1, 2, 3)


def cards_of(fleet: SimulatedFleet, stage: Stage = Stage.QUANTIZE) -> list[tuple[int, ...]]:
    """The cards of each job's stage, in the jobs' order."""
    claims = {step.job: claim for step, claim in fleet.claims.items() if step.stage == stage}
    return [claims[job].cards for job in sorted(claims)]


def test_the_last_model_takes_all_cards_of_its_node_in_one_process() -> None:
    fleet = SimulatedFleet([node("a", 32, gpus=4)], seconds=lambda step, of, at: 10.0)
    pulses: list[Pulse] = []

    class Watch(Told):
        def started(self, *_: object) -> None:
            pulses.append(driver.pulse())

    plan = plan_of([LONG] * 5, "bnb-nf4")
    driver = Driver(fleet, plan, [Watch()], clock=lambda: fleet.now, sleep=fleet.sleep, spread_seconds=1.0)
    driver.run()
    assert commits(driver) == ["c"] * 5
    assert sorted(map(len, cards_of(fleet))) == [1, 1, 1, 1, 4], "while others wait, every card has its own"
    assert not any(step.part for step in fleet.claims), "nothing goes by the disk"
    assert max(pulse.busy_gpus for pulse in pulses) == 4
    (several,) = (claim for claim in fleet.claims.values() if len(claim.cards) > 1)
    assert (several.gpus, several.cpus) == (4, 32)


@pytest.mark.parametrize(("seconds", "nodes"), [(10**9, [node("a", 32, gpus=4)]), (1.0, [node("a", 8, gpus=1)])])
def test_a_short_pass_takes_one_card_and_so_does_one_where_there_is_one(seconds: float, nodes: list[Node]) -> None:
    fleet = SimulatedFleet(nodes)
    assert commits(drive(fleet, plan_of([LONG], "bnb-nf4"), spread_seconds=seconds)) == ["c"]
    assert cards_of(fleet) == [(0,)]


def test_a_model_that_is_still_fetched_waits_for_a_card_too() -> None:
    def seconds(step: Step, of: Job, at: Node) -> float:
        return 50.0 if (step.stage, step.job) == (Stage.FETCH, 1) else 10.0

    fleet = SimulatedFleet([node("a", 32, gpus=4)], seconds=seconds)
    assert commits(drive(fleet, plan_of([size(10**16), LONG], "bnb-nf4"), spread_seconds=1.0)) == ["c"] * 2
    assert cards_of(fleet) == [(0,), ALL]


def test_passes_that_are_ready_at_once_share_the_cards() -> None:
    fleet = SimulatedFleet([node("a", 64, gpus=8)])
    assert commits(drive(fleet, plan_of([LONG] * 3, "bnb-nf4"), spread_seconds=1.0)) == ["c"] * 3
    assert [len(cards) for cards in cards_of(fleet)] == [2, 3, 3]
    assert len({card for cards in cards_of(fleet) for card in cards}) == 8


def test_a_library_that_makes_whole_artifacts_has_one_card() -> None:
    fleet = SimulatedFleet([node("a", 32, gpus=4)])
    drive(fleet, plan_of([LONG], "autoround-w4-g128"), spread_seconds=1.0)
    assert cards_of(fleet) == [(0,)]


def test_after_one_of_several_cards_was_lost_one_is_tried_and_none_is_blamed() -> None:
    tried: list[tuple[int, ...]] = []

    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        if step.stage != Stage.QUANTIZE:
            return None
        tried.append(claim.cards)
        return LOST if 2 in claim.cards else None

    fleet, told = SimulatedFleet([node("a", 32, gpus=4)], fails=fails), Told()
    plan = plan_of([LONG], "bnb-nf4")
    driver = Driver(fleet, plan, [told], clock=lambda: fleet.now, sleep=fleet.sleep, spread_seconds=1.0)
    driver.run()
    assert commits(driver) == ["c"]
    assert tried == [ALL, (0,)]
    assert told.failures == ["the GPU failed; one of cards 0, 1, 2, 3, which isn't known; next: on one card"]


def test_what_ran_out_of_memory_on_several_cards_is_tried_alone_on_one() -> None:
    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        return Failure(kind="OutOfMemory", message="x") if len(claim.cards) > 1 else None

    fleet = SimulatedFleet([node("a", 32, gpus=4)], fails=fails)
    assert commits(drive(fleet, plan_of([LONG], "bnb-nf4"), spread_seconds=1.0)) == ["c"]
    ((cards, step),) = ((claim.cards, step) for step, claim in fleet.claims.items() if step.stage == Stage.QUANTIZE)
    assert cards == (0,)
    assert step in fleet.lean


def of_a_large_artifact(gib: int) -> Estimate:
    """A model that one card of 80 GB quantizes, and whose artifact takes so many GiB to load beside its check."""
    return replace(size(1), quantize=Need(GIB, 20 * GIB), verify=Need(GIB, gib * GIB, 20 * GIB))


@pytest.mark.parametrize(
    ("gib", "cards", "want"),
    [
        (60, 4, (0,)),
        (100, 4, (0, 1)),
        (130, 4, (0, 1, 2)),  # 146 with the eighth that loading takes more: beyond twice 72
        (130, 2, (0,)),  # the runtime loads it on the CPU
        (600, 4, (0,)),
    ],
)
def test_a_verification_has_as_many_cards_as_hold_the_whole_artifact(
    gib: int, cards: int, want: tuple[int, ...]
) -> None:
    fleet = SimulatedFleet([node("a", 32, gpus=cards)])
    assert commits(drive(fleet, plan_of([of_a_large_artifact(gib)], "bnb-nf4"))) == ["c"]
    assert cards_of(fleet, Stage.VERIFY) == [want]
    assert cards_of(fleet) == [(0,)]


def test_a_pass_that_goes_on_with_less_is_placed_on_a_card_with_as_much() -> None:
    """The plan lets it through, for the next layer needn't be on the card ahead; the fleet has to know, too."""
    large = replace(size(1), quantize=Need(GIB, 100 * GIB, 60 * GIB))
    fleet = SimulatedFleet([node("a", 32, gpus=1)])
    assert commits(drive(fleet, plan_of([large], "bnb-nf4"))) == ["c"]


def test_cards_that_are_set_aside_or_busy_are_not_among_several() -> None:
    facts = MachineFacts(node="a", python="3", packages={}, host_memory=10 * GIB, disk_free=1, cpus=32)
    room = Room(node("a", 32, gpus=4, gib=10), facts)
    for _ in range(2):
        room.card_failed(0)
    assert room.several(Need(GIB), 3) == Claim(24, GIB + 2 * FURTHER_CARD_BYTES, 3, (1, 2, 3))
    one = room.compute(Need(GIB))
    assert one is not None
    room.take(one)
    assert room.several(Need(GIB), 3) is None
    both = room.several(Need(GIB), 2)
    assert both is not None
    assert set(both.cards).isdisjoint((0, *one.cards))
    assert room.several(Need(9 * GIB), 2) is None, "each card takes host memory"
    room.take(both)
    assert room.idle_cards == 0
    room.give(both)
    assert room.idle_cards == 2
