"""Environment of the whole suite; libraries read these when they are imported, so they come first. And its limits."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, settings

from tests.limits import TEST_SECONDS
from workers.machine import child
from workers.machine.warm import Parents

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

# Test processes share the cores. OpenMP's threads wait for each other by spinning: two a process, on two cores that
# others use too, take 8 times as long as one (measured: four recipes of llama-tiny, 48 s instead of 6 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the processes of runs, which set their own number of threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Signals that this process ignores (under nohup, or in the background of a script) are ignored by its children, too,
# which tests send them to; those that it takes and does nothing with are not.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# How long an example, or its drawing, may take is a busy machine's to say.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Files are handed out whole, in this order: what takes longest comes first, so that no worker is left with it alone.
LONGEST = (
    "test_run.py", "test_submit.py", "test_hosts.py", "test_spread.py", "test_verify_command.py",
    "test_formats_gptq_awq.py",
    "test_stages.py", "test_planted_faults.py", "test_walk.py", "test_publish_token.py", "test_fleet.py",
    "test_cluster.py",
    "test_publish_faults.py", "test_package.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; a limit for every test that has none of its own."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def parents() -> Iterator[Parents]:
    """Warm parents, as a run has them: a process of its own then costs a fork, not seconds of imports."""
    with closing(Parents()) as parents:
        yield parents


@pytest.fixture
def forked(parents: Parents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes are asked in forks of a warm parent, as they are in a run's stages."""
    address, note = parents.address()
    assert address is not None, note
    monkeypatch.setenv(child.WARM, address)
