"""The warm parent: what it has, what it hands on, and how it ends; real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import GONE_SECONDS, SOON_SECONDS
from tests.pipeline.runs import wait_for
from tests.workers.machine.test_child import ENTRIES, gone
from workers.machine import child, warm
from workers.machine.forkserver import resident_bytes
from workers.machine.warm import Parent, Parents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm parents are of Linux")


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    """One that has imported all that stages need."""
    with Parent() as parent:
        yield parent


def ask(parent: Parent, name: str, request: object = None, **more: str) -> child.Ended:
    ended = child.run(f"{ENTRIES}:{name}", json.dumps(request), warm=parent.address, environment={**os.environ, **more})
    assert ended.note is None
    return ended


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_it_has_imported_and_has_one_thread_and_so_have_its_children(parent: Parent) -> None:
    said = json.loads(ask(parent, "echo").answer or "")
    assert said["modules"] == ["numpy", "torch", "transformers"]
    assert said["threads"] == 1
    assert said["session"] == said["pid"]
    assert threads(parent.pid) == 1
    assert "libcuda.so" not in Path(f"/proc/{parent.pid}/maps").read_text()
    assert not [name for name in said["descriptors"] if name.startswith("socket")], "connections are the parent's own"


def test_its_children_compute_on_as_many_threads_as_they_are_told(parent: Parent) -> None:
    found = [json.loads(ask(parent, "compute", OMP_NUM_THREADS=str(count)).answer or "") for count in (1, 2, 2)]
    assert [row[0] for row in found] == [700.0] * 3
    assert [row[1] for row in found] == [1, 2, 2]
    assert [min(row[2], 2) for row in found] == [1, 2, 2], "pools of libraries may be several"
    assert found[0][3] == found[1][3] == found[2][3], "torch starts from the seed that every process has"
    assert len({row[4] for row in found}) == 3, "numpy from one of its own"
    assert threads(parent.pid) == 1


def test_memory_is_freed_with_a_child(parent: Parent) -> None:
    before = resident_bytes(Path(f"/proc/{parent.pid}/status"))
    for _ in range(3):
        assert json.loads(ask(parent, "hold", 300_000_000).answer or "") == 300_000_000
    assert resident_bytes(Path(f"/proc/{parent.pid}/status")) - before < 20_000_000
    assert parent.stale is None


def test_a_child_has_children_of_the_same_parent(parent: Parent) -> None:
    said = json.loads(ask(parent, "nested").answer or "")
    assert said["request"] == "from within"
    assert said["modules"] == ["numpy", "torch", "transformers"]


def test_what_was_read_when_it_imported_can_not_be_asked_for_otherwise(parent: Parent) -> None:
    other = {**os.environ, "HF_HOME": "/elsewhere"}
    ended = child.run(f"{ENTRIES}:echo", "null", warm=parent.address, environment=other)
    assert ended.note == "not started warm: it was started with another environment (HF_HOME)"
    assert json.loads(ended.answer or "")["modules"] == [], "from nothing"


def test_many_at_once(parent: Parent) -> None:
    answers: list[int] = []
    askers = [
        threading.Thread(target=lambda: answers.append(json.loads(ask(parent, "echo").answer or "")["pid"]))
        for _ in range(8)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(GONE_SECONDS)
    assert len(set(answers)) == 8


OWNER = """
import sys, time
from workers.machine.warm import Parent
parent = Parent(modules=[])
print(parent.pid, parent.address, flush=True)
time.sleep(600)
"""


def test_all_end_with_the_owner_and_what_is_left_is_cleared_away(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, address = owner.stdout.readline().split()
    owner.stdout.close()
    asker = threading.Thread(
        target=child.run, args=(f"{ENTRIES}:hang", json.dumps(str(tmp_path / "pids"))), kwargs={"warm": address}
    )
    asker.start()
    assert wait_for((tmp_path / "pids").exists, SOON_SECONDS)
    own, helper = map(int, (tmp_path / "pids").read_text().split())
    owner.kill()
    owner.wait()
    assert wait_for(lambda: gone(int(pid), own, helper), GONE_SECONDS)
    asker.join(GONE_SECONDS)
    assert not asker.is_alive()
    assert wait_for(lambda: not Path(address).parent.exists(), GONE_SECONDS)


def test_a_killed_parent_takes_its_children_and_is_replaced(tmp_path: Path) -> None:
    parents = Parents(modules=[])
    try:
        first, _ = parents.address()
        assert first is not None
        assert parents.address() == (first, None), "it stays while it's well"
        said = json.loads(child.run(f"{ENTRIES}:echo", "null", warm=first).answer or "")
        ended: list[child.Ended] = []
        entry, request = f"{ENTRIES}:hang", json.dumps(str(tmp_path / "pids"))
        asker = threading.Thread(target=lambda: ended.append(child.run(entry, request, warm=first)))
        asker.start()
        assert wait_for((tmp_path / "pids").exists, SOON_SECONDS)
        own, helper = map(int, (tmp_path / "pids").read_text().split())
        parent = int(Path(f"/proc/{own}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent not in (os.getpid(), said["pid"])
        os.kill(parent, signal.SIGKILL)
        asker.join(GONE_SECONDS)
        assert [each.code for each in ended] == [-signal.SIGKILL], "the child died with it, and that's told"
        assert wait_for(lambda: gone(own), GONE_SECONDS)
        os.kill(helper, signal.SIGKILL)
        second, _ = parents.address()
        assert second != first
        assert child.run(f"{ENTRIES}:echo", "null", warm=second).note is None
    finally:
        parents.close()
    assert not Path(second or "").parent.exists()


def test_one_that_does_not_start_is_tried_once_more_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = Parents(modules=["tests.workers.unfit_module"])
    try:
        for _ in range(2):
            address, note = parents.address()
            assert note is None
            ended = child.run(f"{ENTRIES}:echo", "null", warm=address)
            assert ended.answer is not None, "from nothing instead"
            assert ended.note is not None
            assert "not fit to be forked: what was imported started 1 thread(s)" in ended.note
            assert wait_for(lambda: not parents.alive(), GONE_SECONDS)
        address, note = parents.address()
        assert address is None
        assert note is not None
        assert "doesn't start (not fit to be forked" in note
    finally:
        parents.close()


@pytest.mark.parametrize("change", ["environment", "memory"])
def test_one_whose_environment_or_memory_changed_is_replaced_when_its_children_are_done(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = Parents(modules=[])
    entry, request = f"{ENTRIES}:hang", json.dumps(str(tmp_path / "pids"))
    try:
        first, _ = parents.address()
        asker = threading.Thread(target=child.run, args=(entry, request), kwargs={"warm": first})
        asker.start()
        assert wait_for((tmp_path / "pids").exists, SOON_SECONDS)
        own, helper = map(int, (tmp_path / "pids").read_text().split())
        if change == "environment":
            monkeypatch.setattr(warm, "identity", lambda python: ("another",))
        else:
            monkeypatch.setattr(warm, "resident_bytes", lambda status: 10**12)
        second, _ = parents.address()
        assert second != first
        assert not gone(own), "what runs goes on"
        os.kill(helper, signal.SIGKILL)
        os.kill(own, signal.SIGKILL)
        asker.join(GONE_SECONDS)
        assert wait_for(lambda: not Path(first or "").parent.exists(), GONE_SECONDS), "then it ends"
    finally:
        parents.close()


def test_the_identity_of_an_environment_follows_its_link_and_its_packages(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "lib/python3.11/site-packages").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("one")
    python = str(link / "bin/python")
    before = warm.identity(python)
    assert warm.identity(python) == before
    os.utime(tmp_path / "one/lib/python3.11/site-packages", ns=(1, 1))
    installed = warm.identity(python)
    assert installed != before
    link.unlink()
    link.symlink_to("two")
    assert warm.identity(python) not in (before, installed)
