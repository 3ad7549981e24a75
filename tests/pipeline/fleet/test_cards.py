"""A card that fails is tried no more after the second time, and its stage goes to another."""

from __future__ import annotations

import pytest

from pipeline.fleet.cluster import _cards_of
from pipeline.fleet.placement import Claim, Node, Room, lacking
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.steps import NETWORK_STAGES, Step
from pipeline.planning.sizing import Need
from tests.pipeline.simulated import SimulatedFleet, Told, node, plan_of, size
from workers.machine.preflight import MachineFacts
from workers.spec.job import Failure, Job

LOST = Failure(kind="DeviceLost", message="the GPU failed (CUDA error: uncorrectable ECC error encountered)")


def run(nodes: list[Node], broken: set[tuple[str, int]], jobs: int = 6) -> tuple[list[tuple[str, int]], Told, Driver]:
    """Run small jobs; the cards of ``broken`` (node, card) fail each stage. Returns the places of computing stages."""
    places: list[tuple[str, int]] = []

    def fails(step: Step, job: Job, node: Node, claim: Claim) -> Failure | None:
        if step.stage in NETWORK_STAGES:
            return None
        places.extend((node.id, card) for card in claim.cards)
        return LOST if any((node.id, card) in broken for card in claim.cards) else None

    fleet, told = SimulatedFleet(nodes, fails=fails), Told()
    driver = Driver(fleet, plan_of([size(1)] * jobs, "bnb-nf4"), [told], clock=lambda: fleet.now, sleep=lambda _: None)
    driver.run()
    return places, told, driver


def published(driver: Driver) -> list[bool]:
    return [artifact.commit is not None for run in driver.jobs for artifact in run.artifacts.values()]


def test_a_broken_card_is_set_aside_after_the_second_time_and_said_so() -> None:
    places, told, driver = run([node("a", cpus=4, gpus=2)], {("a", 0)})
    assert places.count(("a", 0)) == 2
    assert all(published(driver))
    assert [text for text in told.failures if "card 0 of a is set aside, for it failed 2 times" in text]


def test_a_node_without_a_card_left_is_left() -> None:
    places, _, driver = run([node("a", cpus=4, gpus=1), node("b", cpus=4, gpus=1)], {("a", 0)})
    assert places.count(("a", 0)) == 2
    assert all(published(driver))


def test_where_all_cards_are_broken_the_jobs_fail_with_that_reason() -> None:
    places, told, driver = run([node("a", cpus=4, gpus=1)], {("a", 0)}, jobs=3)
    assert len(places) == 2
    assert not any(published(driver))
    assert [text for text in told.failures if "GPU: all 1 of a are set aside" in text]


def test_a_cpu_build_of_torch_on_a_node_with_gpus_is_said() -> None:
    facts = MachineFacts(
        node="a", python="3", packages={"torch": "2.13"}, host_memory=8, disk_free=8, cpus=4, torch_cuda=None
    )
    (found,) = lacking(Room(node("a", gpus=2), facts), Need(0), 0, "m")
    assert "Ray schedules 2 on a, but torch 2.13 (built without CUDA) finds none" in found


@pytest.mark.parametrize(
    ("claim", "embedded", "visible", "want"),
    [
        (Claim(1, 1), True, None, ""),
        (Claim(1, 1), False, "2,3", ""),
        (Claim(1, 1, 0.5, (1,)), True, None, "1"),
        (Claim(1, 1, 1.0, (1,)), True, "2,3", "3"),
        (Claim(1, 1, 1.0, (0,)), True, "GPU-1f, GPU-2e", "GPU-1f"),
        (Claim(1, 1, 2.0, (0, 2)), True, None, "0,2"),
        (Claim(1, 1, 2.0, (0, 2)), True, "GPU-1f, GPU-2e, GPU-3d", "GPU-1f,GPU-3d"),
        (Claim(1, 1, 1.0, (1,)), False, "2,3", None),
    ],
)
def test_a_stage_sees_the_card_of_its_claim_and_none_without_one(
    claim: Claim, embedded: bool, visible: str | None, want: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _cards_of(claim, embedded=embedded) == want
