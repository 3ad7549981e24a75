"""What limits memory, and which deaths count as out of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import RUN_SECONDS
from tests.pipeline.runs import ROOT
from workers.errors import OutOfMemory, WorkerDied
from workers.machine import cgroup, child, memory
from workers.machine.failures import classify, of_a_process

ENTRIES = "tests.workers.warm_entries"
NONE_IN_V1 = 9223372036854771712
UNIFIED = "31 23 0:28 {inner} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
MEMORY = "35 31 0:32 {inner} {mount} rw,relatime - cgroup cgroup rw,memory"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def tree(root: Path, own: str, mounts: str) -> None:
    write(root / cgroup.OWN, own)
    write(root / cgroup.MOUNTINFO, mounts)


LIMITS = st.lists(st.one_of(st.none(), st.integers(1, 2**50)), min_size=1, max_size=5)


@given(limits=LIMITS, high=LIMITS)
def test_the_smallest_limit_on_the_way_up_holds(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int | None], high: list[int | None]
) -> None:
    root = tmp_path_factory.mktemp("v2")
    folder, path = root / "sys/fs/cgroup", "/".join(f"g{depth}" for depth in range(len(limits)))
    tree(root, f"0::/{path}", UNIFIED.format(inner="/", mount="/sys/fs/cgroup"))
    for depth, limit in enumerate(limits):
        folder = folder / f"g{depth}"
        write(folder / "memory.max", "max" if limit is None else limit)
        if depth < len(high):
            write(folder / "memory.high", "max" if high[depth] is None else high[depth])
    known = [limit for limit in (*limits, *high[: len(limits)]) if limit is not None]
    assert cgroup.memory_limit(root) == min(known, default=None)


@given(limits=LIMITS, hidden=st.one_of(st.none(), st.integers(1, 2**50)), nested=st.booleans())
def test_version_1_and_what_a_container_does_not_see(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int | None], hidden: int | None, nested: bool
) -> None:
    root = tmp_path_factory.mktemp("v1")
    path = "docker/abc/" + "/".join(f"g{depth}" for depth in range(len(limits)))
    mounts = MEMORY.format(inner="/docker/abc", mount="/sys/fs/cgroup/memory")
    tree(root, f"5:cpu,cpuacct:/x\n4:memory:/{path}\n0::/", mounts)
    folder = root / "sys/fs/cgroup/memory"
    for depth, limit in enumerate(limits):
        folder = folder / f"g{depth}"
        write(folder / "memory.limit_in_bytes", NONE_IN_V1 if limit is None else limit)
        write(folder / "memory.use_hierarchy", int(nested))
    write(folder / "memory.stat", f"cache 1\nhierarchical_memory_limit {hidden or NONE_IN_V1}")
    counted = limits if nested else limits[-1:]
    known = [limit for limit in (*counted, hidden) if limit is not None]
    assert cgroup.memory_limit(root) == min(known, default=NONE_IN_V1)
    assert memory.host_memory(root) == min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *known])


@pytest.mark.parametrize(
    ("own", "inner", "lies"),
    [
        ("/docker/abc", "/docker/abc", ""),  # a container without a namespace of its own
        ("/", "/", ""),  # with one
        ("/docker/abc/job", "/docker/abc", "job"),
        ("/../../elsewhere", "/", ""),  # moved out of its namespace's root
        ("/host/path", "/docker/abc", ""),
        ("/gone", "/", ""),  # a group that the mount point doesn't show
    ],
)
def test_the_group_is_found_where_its_hierarchy_is_mounted(tmp_path: Path, own: str, inner: str, lies: str) -> None:
    tree(tmp_path, f"0::{own}", UNIFIED.format(inner=inner, mount=r"/mnt/a\040b"))
    write(tmp_path / "mnt/a b/memory.max", "max")
    write(tmp_path / "mnt/a b" / lies / "memory.max", 7)
    write(tmp_path / "mnt/a b" / lies / "memory.events", "low 0\noom 3\noom_kill 2")
    write(tmp_path / "mnt/a b" / lies / "memory.peak", 6)
    assert (cgroup.memory_limit(tmp_path), cgroup.oom_kills(tmp_path), cgroup.peak_bytes(tmp_path)) == (7, 2, 6)


@given(own=st.binary(max_size=200), mounts=st.binary(max_size=300), limit=st.binary(max_size=40))
def test_garbage_is_no_limit_and_no_error(
    tmp_path_factory: pytest.TempPathFactory, own: bytes, mounts: bytes, limit: bytes
) -> None:
    root = tmp_path_factory.mktemp("garbage")
    files = {cgroup.OWN: b"0::/\n" + own, cgroup.MOUNTINFO: mounts, "sys/fs/cgroup/memory.max": limit}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    found = cgroup.memory_limit(root)
    assert found is None or found > 0
    assert cgroup.oom_kills(root) is None
    assert memory.host_memory(root) > 0


def test_this_machine_can_be_read() -> None:
    assert 2**28 < memory.host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("before", "after", "limit", "peaks", "why"),
    [
        (3, 4, 2**30, (0, 0), "the kernel killed it for want of memory, at a limit of 2.0 GiB"),
        (3, 3, 2**30, (2**29, 2**30), "with 1.0 GiB of 1.0 GiB in use"),
        (3, 3, 2**30, (2**30, 2**30), None),  # it had been near before: files that were read count as use
        (3, 3, NONE_IN_V1, (0, 2**40), None),
        (3, 3, None, (0, 0), None),  # somebody else's SIGKILL
        (None, None, None, (0, 0), "as the kernel does without memory"),
    ],
)
def test_whose_kill_it_was(
    before: int | None, after: int | None, limit: int | None, peaks: tuple[int, int], why: str | None
) -> None:
    said = memory.killed(before, after, limit, peaks, 2**31)
    assert said is None if why is None else why in (said or "")


@pytest.mark.parametrize(
    ("code", "stderr", "counts"),
    [
        (1, "Traceback\nMemoryError: too much\n", True),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n", True),
        (1, "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\n\nmore\n", True),
        (1, "OSError: [Errno 12] Cannot allocate memory\n", True),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", True),
        (1, "ValueError: as asked\n", False),
        (1, "MemoryError\n" + "line\n" * 9, False),
        (0, "MemoryError was caught\n", False),
        (-11, "", False),
    ],
)  # fmt: skip
def test_what_a_process_said_last(code: int, stderr: str, counts: bool) -> None:
    why = memory.MemoryWatch().why(code, stderr)
    assert (why is not None) == counts
    error = of_a_process("quantize", child.Ended(code, stderr, memory=why))
    assert type(error) is (OutOfMemory if counts else WorkerDied)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)  # fmt: skip
def test_errors_of_allocators_are_out_of_memory(error: Exception) -> None:
    assert type(classify(error)) is OutOfMemory


# ------------------------------------------------------------------------------------------- a limit that holds


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of 400 MiB inside this process's own, where the test may make one."""
    groups = [group for group in cgroup._groups(cgroup.ROOT) if group.version == 1]
    if not groups:
        pytest.skip("no hierarchy of version 1: making one of version 2 would move this process")
    folder = groups[0].folder / f"quantmill-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(400 * 2**20))
    except OSError as error:
        pytest.skip(f"control groups can't be made here ({error})")
    yield folder
    folder.rmdir()


INSIDE = """
import json, os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
from workers.machine import child, memory
from workers.machine.warm import Parent
from tests.workers.memory_run import smaller_retry
print(json.dumps(smaller_retry()))
"""


def test_a_limit_on_the_whole_run_leads_to_a_smaller_retry_that_succeeds(limited: Path) -> None:
    """The kernel's own limit: the stage's process is killed, its parent lives, the retry is smaller and says so."""
    done = subprocess.run(
        [sys.executable, "-c", INSIDE, str(limited)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=RUN_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_told(json.loads(done.stdout), "the kernel killed it for want of memory, at a limit of 0.4 GiB")


def check_told(told: dict[str, list[str]], why: str) -> None:
    assert told["statuses"] == ["published"]
    first, *others = told["failures"]
    assert f"quantize: out of memory ({why})" in first
    assert "next: alone on its node, and in the smallest micro-batches" in first
    assert not others
    assert told["asked"] == ["full", "lean"]


def test_files_that_tell_of_a_kill_do_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no group can be made: its files, and a process that kills itself after it has counted the kill there."""
    from tests.workers.memory_run import smaller_retry

    tree(tmp_path, "0::/", UNIFIED.format(inner="/", mount="/sys/fs/cgroup"))
    write(tmp_path / "sys/fs/cgroup/memory.max", 400 * 2**20)
    write(tmp_path / "sys/fs/cgroup/memory.events", "oom_kill 0")
    monkeypatch.setattr(child, "MemoryWatch", lambda: memory.MemoryWatch(tmp_path))
    told = smaller_retry(events=tmp_path / "sys/fs/cgroup/memory.events")
    check_told(told, "the kernel killed it for want of memory, at a limit of 0.4 GiB")


def test_a_kill_by_somebody_else_is_a_death(tmp_path: Path) -> None:
    ended = child.run(f"{ENTRIES}:fail", json.dumps("kill"))
    assert ended.code == -signal.SIGKILL
    assert type(of_a_process("verify", ended)) is WorkerDied
