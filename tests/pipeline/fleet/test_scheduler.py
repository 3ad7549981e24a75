"""The driver's decisions, in virtual time: what goes where and when, and what breaks in between."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fleet.placement import Claim, Node, Room, unmatched
from pipeline.fleet.scheduler import PATIENCE, TRANSFERS, Driver
from pipeline.fleet.sites import Probed
from pipeline.fleet.steps import Step
from pipeline.planning.sizing import STARTING_SECONDS, Need, deadline_seconds
from tests.pipeline.simulated import (
    DIED,
    GIB,
    SimulatedFleet,
    commits,
    computing,
    drive,
    node,
    plan_of,
    size,
)
from workers.machine.preflight import Device, MachineFacts
from workers.spec.job import Failure, Job, Stage

OUT_OF_MEMORY = Failure(kind="OutOfMemory", message="no memory")


def test_jobs_are_spread_over_the_nodes_and_transfers_are_bounded() -> None:
    fleet = SimulatedFleet([node("a", 16), node("b", 16)])
    driver = drive(fleet, plan_of([size()] * 40, "bnb-nf4"))
    assert commits(driver) == ["c"] * 40
    assert {run.node for run in driver.jobs} == {"a", "b"}
    assert 1 < max(count for (_, stage), count in fleet.most.items() if not computing(Step(0, stage))) <= TRANSFERS


def test_models_are_fetched_while_others_compute() -> None:
    fleet = SimulatedFleet([node("a", 2)], seconds=lambda step, of, at: 10.0)
    driver = drive(fleet, plan_of([size()] * 10, "bnb-nf4"))
    assert commits(driver) == ["c"] * 10
    # 10 jobs of two computing stages on two slots, after the first fetch and before the last publish.
    assert fleet.now == pytest.approx(10 + 10 * 2 * 10 / 2 + 10, abs=21)


def test_only_so_much_is_fetched_as_the_disk_holds() -> None:
    fleet = SimulatedFleet([node("a", 2), node("b", 2)], disk=100)
    fleet.disks["b"] = 35
    driver = drive(fleet, plan_of([size(disk=30)] * 6, "bnb-nf4"))
    assert Counter(run.node for run in driver.jobs) == {"a": 3, "b": 1, "": 2}
    failures = [run.artifacts["bnb-nf4"].failure for run in driver.jobs if not run.node]
    for failure in failures:
        assert failure is not None
        assert failure.kind == "DiskFull"
        assert "0.0 GB left on the roomiest node" in failure.message


def test_a_job_whose_node_vanishes_begins_anew_on_another() -> None:
    for seconds in (0.5, 1.5, 2.5, 3.5):
        fleet = SimulatedFleet([node("a"), node("b")])
        fleet.at(seconds, lambda fleet=fleet: fleet.vanish("a"))  # type: ignore[misc]
        driver = drive(fleet, plan_of([size()] * 4, "bnb-nf4", "bnb-int8"))
        assert commits(driver) == ["c"] * 8, seconds
        assert {run.node for run in driver.jobs} == {"b"} or seconds > 1
        assert not any(at == "a" for when, event, at, _ in fleet.log if event == "started" and when > seconds + 1)


def test_a_node_that_joins_is_given_work() -> None:
    fleet = SimulatedFleet([node("a")], seconds=lambda step, of, at: 100.0)
    fleet.at(50.0, lambda: fleet.alive.update(b=node("b")))
    driver = drive(fleet, plan_of([size()] * 8, "bnb-nf4"))
    assert commits(driver) == ["c"] * 8
    assert Counter(run.node for run in driver.jobs)["b"] >= 3


def test_a_job_that_fits_on_no_node_is_told_why_and_the_others_go_on() -> None:
    fleet = SimulatedFleet([node("a", gib=1), node("b", gib=2)])
    driver = drive(fleet, plan_of([size(), size(host=10**10), size(disk=10**16)], "bnb-nf4"))
    assert commits(driver) == ["c", None, None]
    for run, said in zip(
        driver.jobs[1:], ("host memory: 1.1 GB on a, expected at least 10.0 GB", "disk:"), strict=True
    ):
        failure = run.artifacts["bnb-nf4"].failure
        assert failure is not None
        assert failure.kind == "PreflightError"
        assert said in failure.message
        assert "on b" in failure.message


def test_without_a_node_that_answers_every_job_says_so() -> None:
    driver = drive(SimulatedFleet([]), plan_of([size()] * 2, "bnb-nf4"))
    failures = [artifact.failure for run in driver.jobs for artifact in run.artifacts.values()]
    assert all(failure and "no node of the cluster answers" in failure.message for failure in failures)


def test_the_longest_jobs_go_first_and_their_work_is_balanced() -> None:
    sizes = (1, 9, 2, 8, 4)
    fleet = SimulatedFleet([node("a"), node("b")], seconds=lambda step, of, at: float(sizes[step.job]))
    driver = drive(fleet, plan_of([size(10**9 * each) for each in sizes], "bnb-nf4"))
    by_node = {name: [sizes[run.index] for run in driver.jobs if run.node == name] for name in ("a", "b")}
    assert sorted(sorted(each, reverse=True) for each in by_node.values()) == [[8, 4], [9, 2, 1]]
    for name in by_node:
        order = [sizes[step.job] for _, event, at, step in fleet.log
                 if (event, at, step.stage) == ("started", name, Stage.FETCH)]  # fmt: skip
        assert order == sorted(order, reverse=True)


def test_stages_of_jobs_that_are_nearly_done_come_first() -> None:
    fleet = SimulatedFleet([node("a")])
    drive(fleet, plan_of([size()] * 6, "bnb-nf4"))
    computed = [step.stage for _, event, _, step in fleet.log if event == "started" and computing(step)]
    assert computed[:6].count(Stage.VERIFY) >= 2, "verifying waits until all is quantized"


def test_a_card_is_shared_by_what_fits_it_together_and_only_when_there_is_no_other() -> None:
    shapes = [size(device=20 * GIB)] * 9
    fleet = SimulatedFleet([node("a", 64, gpus=2)], seconds=lambda step, of, at: 10.0)
    driver = drive(fleet, plan_of(shapes, "bnb-nf4"))
    assert commits(driver) == ["c"] * 9
    assert {claim.gpus for step, claim in fleet.claims.items() if computing(step)} <= {1.0, 1 / 2, 1 / 3}
    assert any(claim.gpus == 1 / 3 for claim in fleet.claims.values())
    alone = SimulatedFleet([node("a", 64, gpus=2)])
    drive(alone, plan_of(shapes[:2], "bnb-nf4"))
    assert {claim.gpus for step, claim in alone.claims.items() if computing(step)} == {1.0}


def test_a_model_too_large_for_a_card_goes_to_a_larger_one_or_nowhere() -> None:
    small = SimulatedFleet([node("a", 8, gpus=1)], card_gib=24)
    driver = drive(small, plan_of([size(device=40 * GIB)], "bnb-nf4"))
    failure = driver.jobs[0].artifacts["bnb-nf4"].failure
    assert failure is not None
    assert "GPU memory: 23.2 GB usable of card on a, expected at least 42.9 GB" in failure.message


def test_what_ran_out_of_memory_is_tried_alone_and_then_on_a_larger_node_and_never_the_same_again() -> None:
    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        tight = step.job == 3 and step.stage == Stage.QUANTIZE and at.id == "a"
        return OUT_OF_MEMORY if tight else None

    fleet = SimulatedFleet([node("a", 8, gib=64)], fails=fails)
    fleet.alive["b"] = node("b", 2, gib=128)
    sizes = [size(host=GIB)] * 6
    driver = drive(fleet, plan_of(sizes, "bnb-nf4"))
    assert commits(driver) == ["c"] * 6
    tried = [(at, step in fleet.lean) for _, event, at, step in fleet.log if event == "started" and step.job == 3
             and step.stage == Stage.QUANTIZE]  # fmt: skip
    if tried[0][0] == "a":
        assert [at for at, _ in tried] == ["a", "a", "b"]
    only = SimulatedFleet([node("a", 8, gib=64)], fails=fails)
    driver = drive(only, plan_of(sizes, "bnb-nf4"))
    assert commits(driver) == ["c", "c", "c", None, "c", "c"]
    tried_here = [step for _, event, _, step in only.log if event == "started" and step.job == 3]
    assert [step.stage for step in tried_here] == [Stage.FETCH, Stage.QUANTIZE, Stage.QUANTIZE]
    alone = next(step for step in tried_here if step in only.lean)
    begun = [when for when, event, _, step in only.log if event == "started" and step == alone][-1]
    others = [
        when for when, event, _, step in only.log if event == "ended" and computing(step) and step.job != alone.job
    ]
    assert not any(begun < when < begun + 1 for when in others), "it wasn't alone"


def test_a_full_disk_sends_a_job_to_a_roomier_node_once() -> None:
    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        full = step.stage == Stage.QUANTIZE and step.job == 0
        return Failure(kind="DiskFull", message="no space") if full else None

    fleet = SimulatedFleet([node("a"), node("b")], fails=fails, disk=100)
    fleet.disks["b"] = 1000
    driver = drive(fleet, plan_of([size(disk=1), size(disk=1)], "bnb-nf4"))
    assert commits(driver) == [None, "c"]
    tried = [at for _, event, at, step in fleet.log if event == "started" and step.job == 0
             and step.stage == Stage.QUANTIZE]  # fmt: skip
    assert tried in (["a", "b"], ["b"])


def test_a_poisoned_model_stops_nothing_else() -> None:
    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        return DIED if step.job == 1 and step.stage == Stage.QUANTIZE else None

    fleet = SimulatedFleet([node("a"), node("b")], fails=fails)
    driver = drive(fleet, plan_of([size()] * 5, "bnb-nf4"))
    assert commits(driver) == ["c", None, "c", "c", "c"]
    assert fleet.order_of(Stage.QUANTIZE).count(1) == 3


def test_a_large_stage_is_not_passed_over_for_ever() -> None:
    fleet = SimulatedFleet([node("a", 8, gib=8)], seconds=lambda step, of, at: 1.0 + random.Random(step.job).random())
    large = size(1, host=int(7.5 * GIB))
    driver = drive(fleet, plan_of([*[size(100, host=3 * GIB)] * 120, large], "bnb-nf4"))
    assert commits(driver) == ["c"] * 121
    begun = fleet.order_of(Stage.QUANTIZE)
    fetched = fleet.order_of(Stage.FETCH, "ended")
    assert begun.index(120) - fetched.index(120) < 3 * PATIENCE


def parts_of(fleet: SimulatedFleet) -> list[tuple[str, int]]:
    started = [step.part for _, event, _, step in fleet.log if event == "started" and step.part]
    return [(part.step, part.index) for part in started]


SPREAD = [*(("gather", index) for index in range(4)), *(("solve", index) for index in range(4)), ("join", 0)]


def test_the_last_model_is_spread_over_the_cores_of_its_node() -> None:
    fleet = SimulatedFleet([node("a", 32)], seconds=lambda step, of, at: 10.0)
    driver = drive(fleet, plan_of([size(10**15)] * 5, "bnb-nf4"), spread_seconds=1.0)
    assert commits(driver) == ["c"] * 5
    assert len({step.job for step in fleet.claims if step.part}) == 1, "while others wait, every slot has its own"
    assert parts_of(fleet) == SPREAD
    spread = next(step.job for step in fleet.claims if step.part)
    assert driver.jobs[spread].seconds[Stage.QUANTIZE] == 30.0


class FailingPart:
    """The third part of solving fails so many times."""

    def __init__(self, failure: Failure, times: int) -> None:
        self._failure, self._times = failure, times

    def __call__(self, step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        if step.part is None or (step.part.step, step.part.index) != ("solve", 2) or not self._times:
            return None
        self._times -= 1
        return self._failure


@pytest.mark.parametrize(
    ("failure", "times", "commit"),
    [(DIED, 1, "c"), (DIED, 9, None), (Failure(kind="NumericalError", message="nan"), 1, None)],
)
def test_a_part_that_dies_is_done_again_and_one_that_fails_fails_the_job(
    failure: Failure, times: int, commit: str | None
) -> None:
    fleet = SimulatedFleet([node("a", 32)], fails=FailingPart(failure, times))
    driver = drive(fleet, plan_of([size(10**15)], "bnb-nf4"), spread_seconds=1.0)
    assert commits(driver) == [commit]
    assert (("join", 0) in parts_of(fleet)) == (commit is not None)


def test_what_does_not_fit_beside_its_other_parts_is_tried_in_one_piece() -> None:
    fleet = SimulatedFleet([node("a", 32)], fails=FailingPart(OUT_OF_MEMORY, 1))
    assert commits(drive(fleet, plan_of([size(10**15)], "bnb-nf4"), spread_seconds=1.0)) == ["c"]
    started = [step for _, event, _, step in fleet.log if event == "started" and step.stage == Stage.QUANTIZE]
    whole = [step for step in started if not step.part]
    assert len(whole) == 1
    assert whole[0] in fleet.lean


def test_copies_to_the_storage_are_made_while_the_slots_compute() -> None:
    plan = plan_of([size(1), size(1), size(1)], "bnb-nf4", "bnb-int8")
    seconds = {}
    for storage in (None, "/shared"):
        fleet = SimulatedFleet([node("a", cpus=2)], seconds=lambda step, job, node: 10.0)
        jobs = tuple(job.model_copy(update={"storage": storage}) for job in plan.jobs)
        assert commits(drive(fleet, replace(plan, jobs=jobs))) == ["c"] * 6
        assert sorted(fleet.order_of(Stage.KEEP)) == ([0, 0, 1, 1, 2, 2] if storage else [])
        seconds[storage] = fleet.now
    assert seconds["/shared"] == seconds[None]


def test_a_node_that_vanishes_takes_all_parts_with_it() -> None:
    fleet = SimulatedFleet([node("a", 32)], seconds=lambda step, of, at: 10.0)
    fleet.at(25.0, lambda: fleet.vanish("a"))
    fleet.at(24.0, lambda: fleet.alive.update(b=node("b", 32)))
    assert commits(drive(fleet, plan_of([size(10**15)], "bnb-nf4"), spread_seconds=1.0)) == ["c"]
    assert parts_of(fleet)[-9:] == SPREAD


def test_labels_choose_nodes() -> None:
    fleet = SimulatedFleet([node("a", kind="T4"), node("b", kind="H100")])
    plan = plan_of([size()] * 4, "bnb-nf4")
    orders = [job.orders[0] for job in plan.jobs]
    choosy = orders[0].model_copy(
        update={"recipe": orders[0].recipe.model_copy(update={"labels": {"kind": "in(H100)"}})}
    )
    jobs = (plan.jobs[0].model_copy(update={"orders": (choosy,)}), *plan.jobs[1:])
    # A recipe of another name, for what a recipe needs is looked up by its name.
    renamed = choosy.recipe.model_copy(update={"name": "choosy"})
    jobs = (jobs[0].model_copy(update={"orders": (choosy.model_copy(update={"recipe": renamed}),)}), *jobs[1:])
    cells = [cell if index else type(cell)(cell.source, jobs[0].orders[0], cell.estimate)
             for index, cell in enumerate(plan.artifacts)]  # fmt: skip
    driver = drive(fleet, type(plan)("labels", tuple(cells), jobs))
    assert driver.jobs[0].node == "b"
    assert unmatched({"kind": "T4"}, {"kind": "!in(T4, L4)"}) == ["kind"]
    assert unmatched({"kind": "T4"}, {"kind": "!L4", "zone": "!x"}) == []
    assert unmatched({}, {"kind": "T4"}) == ["kind"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_breaks_every_job_ends_and_no_node_is_overbooked(seed: int) -> None:
    draw = random.Random(seed)
    kinds = ["HubUnavailable", "WorkerDied", "OutOfMemory", "DiskFull", "StageHung", "CheckpointError"]

    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        return Failure(kind=draw.choice(kinds), message="x") if draw.random() < 0.15 else None

    names = [f"n{index}" for index in range(draw.randint(1, 5))]
    nodes = [node(name, draw.randint(2, 16), draw.choice((0, 0, 1, 4)), draw.choice((16, 64))) for name in names]
    fleet = SimulatedFleet(
        nodes, seconds=lambda step, of, at: draw.random() * 10, fails=fails, disk=draw.choice((50, 1000)), card_gib=40
    )
    for name in names[1:]:
        if draw.random() < 0.5:
            fleet.at(draw.random() * 30, lambda name=name: fleet.vanish(name))  # type: ignore[misc]
    sizes = [
        size(draw.randint(1, 100), host=draw.randint(1, 20) * GIB, device=draw.randint(0, 39) * GIB, disk=5)
        for _ in range(draw.randint(1, 25))
    ]
    spread_seconds = draw.choice((0.0, math.inf))
    driver = drive(fleet, plan_of(sizes, "bnb-nf4", "bnb-int8"), spread_seconds)
    for run in driver.jobs:
        for artifact in run.artifacts.values():
            assert (artifact.commit is None) != (artifact.failure is None)


def test_a_share_of_a_card_is_one_over_a_whole_number() -> None:
    facts = MachineFacts(
        node="n", python="3", packages={}, devices=(Device(name="c", capability=(9, 0), memory=80 * GIB),),
        host_memory=GIB, disk_free=1, cpus=64,
    )  # fmt: skip
    for gib in range(1, 90):
        room = Room(node("n", 64, gpus=1), facts)
        claim = room.compute(Need(0, gib * GIB), most=8)
        assert claim is not None
        assert 1 / claim.gpus == pytest.approx(round(1 / claim.gpus))
        assert round(1 / claim.gpus) * gib <= 72 or claim.gpus == 1
        taken = 0
        while claim := room.compute(Need(0, gib * GIB), most=8):
            room.take(claim)
            taken += 1
        assert taken == room.parts(Need(0, gib * GIB))


def test_a_stage_gets_as_long_as_its_work_takes_at_a_crawl() -> None:
    assert deadline_seconds(Stage.FETCH, 0, 0, 1, 0) == STARTING_SECONDS
    assert deadline_seconds(Stage.FETCH, 10**9, 0, 1, 0) > 4000
    slow, fast = (deadline_seconds(Stage.QUANTIZE, 0, 10**15, 4, gpus) for gpus in (0, 1))
    assert slow > 200_000 > fast > STARTING_SECONDS


def test_what_fits_nowhere_is_told_without_starting_anything() -> None:
    fleet = SimulatedFleet([node("a", gib=1), node("b", gib=2)])
    driver = Driver(fleet, plan_of([size(), size(host=10**10)], "bnb-nf4"), [])
    (run, message), = driver.infeasible()  # fmt: skip
    assert run.index == 1
    assert message.startswith("INFEASIBLE: 2 problem(s) for 'org/model-1': host memory: 1.1 GB on a")
    assert not fleet.log


def test_a_recipe_that_no_node_can_make_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = SimulatedFleet([node("a"), node("b")])
    whole = fleet.probe

    def probe(nodes: Sequence[Node], environments: Iterable[str | None]) -> Probed:
        answers = whole(nodes, environments)
        return {name: {**facts, "llama-cpp": "environment 'llama-cpp' isn't built"} for name, facts in answers.items()}

    monkeypatch.setattr(fleet, "probe", probe)
    driver = drive(fleet, plan_of([size(), size()], "gguf-q4_0", "bnb-nf4"))
    assert commits(driver) == [None, "c"] * 2
    for run in driver.jobs:
        failure = run.artifacts["gguf-q4_0"].failure
        assert failure is not None
        assert failure.kind == "PreflightError"
        assert "under recipe 'gguf-q4_0': a: environment 'llama-cpp' isn't built" in failure.message
        assert run.artifacts["bnb-nf4"].failure is None
    alone = drive(fleet, plan_of([size()], "gguf-q4_0"))
    failure = alone.jobs[0].artifacts["gguf-q4_0"].failure
    assert failure is not None
    assert "problem(s) for 'org/model-0': " in failure.message
