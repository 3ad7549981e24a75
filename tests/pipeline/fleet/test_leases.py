"""Two drivers at the same artifacts: one makes them, the other waits, and takes over from one that died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.fleet.leases import ASK_SECONDS, LEASE_SECONDS, Holder, LeaseTable, new_owner, of_this_machine
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.steps import JobRun
from tests.pipeline.fleet.test_decisions import manifest
from tests.pipeline.simulated import SimulatedFleet, node, plan_of, size
from workers.spec.job import Job, Manifest, Order, Stage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_owner_at_a_time_until_the_lease_expires() -> None:
    clock = Clock()
    table = LeaseTable(clock=clock)
    assert table.take("a", ["x", "y"])
    assert table.take("a", ["x"]), "its own"
    assert not table.take("b", ["y", "z"])
    assert table.take("c", ["z"]), "nothing was taken with the key that wasn't to be had"
    clock.now = LEASE_SECONDS - 1
    assert table.take("a", ["x"]), "kept by asking again"
    clock.now = LEASE_SECONDS + 1
    assert table.take("b", ["y"])
    assert not table.take("b", ["x"])
    table.drop("a", ["x", "y"])
    assert table.take("b", ["x"])
    assert not table.take("a", ["y"]), "what another holds isn't dropped"


def test_what_a_dead_process_held_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from pipeline.fleet.leases import *; t = of_this_machine(); print(t.take(new_owner('run'), ['x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    mine = new_owner("other")
    assert of_this_machine().take(mine, ["x"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", "this process lives"


def holder(table: LeaseTable, owner: str, made: dict[str, str]) -> Holder:
    def standing(job: Job, order: Order) -> tuple[Manifest, str | None] | None:
        name = order.recipe.name
        return (manifest(job, name, True), made[f"{job.model.id} {name}"]) if f"{job.model.id} {name}" in made else None

    return Holder(table, owner, standing)


def _told_apart(order: Order, index: int) -> Order:
    return order.model_copy(update={"fingerprint": f"{index}{order.fingerprint}"})


def drive(table: LeaseTable, fleet: SimulatedFleet, owner: str, made: dict[str, str]) -> list[JobRun]:
    plan = plan_of([size()] * 3, "bnb-nf4", "bnb-int8")
    # One repository for all of them would be one artifact.
    jobs = tuple(
        job.model_copy(update={"orders": tuple(_told_apart(order, i) for order in job.orders)})
        for i, job in enumerate(plan.jobs)
    )
    plan = type(plan)(plan.zoo, plan.artifacts, jobs)
    driver = Driver(fleet, plan, [], clock=lambda: fleet.now, sleep=fleet.sleep, holder=holder(table, owner, made))
    driver.run()
    return driver.jobs


def test_a_second_driver_waits_and_skips_what_the_first_has_made() -> None:
    clock, made = Clock(), {}
    table = LeaseTable(clock=lambda: fleet.now)
    fleet = SimulatedFleet([node("a")])
    jobs = [f"http://127.0.0.1:1 acme/model-{name} 1{name * 8}" for name in ("bnb-nf4", "bnb-int8")]
    assert table.take("first", jobs)

    def finish() -> None:
        made.update({"org/model-1 bnb-nf4": "theirs", "org/model-1 bnb-int8": "theirs"})
        table.drop("first", jobs)

    fleet.at(25.0, finish)
    runs = drive(table, fleet, "second", made)
    commits = [[artifact.commit for artifact in run.artifacts.values()] for run in runs]
    assert commits == [["c", "c"], ["theirs", "theirs"], ["c", "c"]]
    assert all(artifact.elsewhere for artifact in runs[1].artifacts.values())
    assert 1 not in fleet.order_of(Stage.FETCH)
    assert fleet.now <= 25 + 2 * ASK_SECONDS
    assert table.take("third", jobs), "nothing is held by a driver that is done"
    assert clock.now == 0


def test_a_second_driver_takes_over_what_a_dead_one_left() -> None:
    made = {"org/model-1 bnb-nf4": "theirs"}
    fleet = SimulatedFleet([node("a")])
    table = LeaseTable(clock=lambda: fleet.now)
    assert table.take(
        "first", [f"http://127.0.0.1:1 acme/model-{name} 1{name * 8}" for name in ("bnb-nf4", "bnb-int8")]
    )
    runs = drive(table, fleet, "second", made)
    commits = [[artifact.commit for artifact in run.artifacts.values()] for run in runs]
    assert commits == [["c", "c"], ["theirs", "c"], ["c", "c"]]
    assert LEASE_SECONDS < fleet.now < LEASE_SECONDS + 4 * ASK_SECONDS
