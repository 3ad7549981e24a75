"""A fresh process that is asked something: from nothing, and of a warm parent; the same in both ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import GONE_SECONDS, SOON_SECONDS
from tests.pipeline.runs import wait_for
from workers.machine import child
from workers.machine.secrets import without_secrets
from workers.machine.warm import Parent

ENTRIES = "tests.workers.warm_entries"


@pytest.fixture(scope="module", params=["from nothing", "warm"])
def warm(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "from nothing":
        yield None
        return
    with Parent(modules=[ENTRIES]) as parent:
        yield parent.address


def gone(*pids: int) -> bool:
    """Whether none of the processes is left; one that nobody has reaped is gone."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return False
        except OSError:
            continue
    return True


def test_it_has_the_environment_and_the_place_that_were_asked_for(warm: str | None, tmp_path: Path) -> None:
    given = without_secrets({**{k: v for k, v in os.environ.items() if k != "LANG"}, "OWN": "yes"})
    ended = child.run(f"{ENTRIES}:echo", json.dumps({"a": [1, "\u00e4"]}), warm=warm, environment=given, cwd=tmp_path)
    assert ended.answer is not None, ended.stderr
    said = json.loads(ended.answer)
    assert said["request"] == {"a": [1, "\u00e4"]}
    assert said["cwd"] == str(tmp_path)
    assert said["pid"] != os.getpid()
    assert said["nice"] == os.nice(0)
    assert ended.note is None
    pythons = (child.WARM, "PYTHONPATH", "LC_CTYPE")
    ours = {name: value for name, value in said["environment"].items() if name not in pythons}
    assert ours == {name: value for name, value in given.items() if name not in pythons}
    assert said["environment"].get(child.WARM) == warm


def test_no_state_is_left_from_one_to_the_next(warm: str | None) -> None:
    answers = [child.run(f"{ENTRIES}:mark", "null", warm=warm).answer for _ in range(3)]
    seen, drawn = zip(*(json.loads(answer) for answer in answers if answer), strict=True)
    assert seen == (0, 0, 0)
    assert len(set(drawn)) == 3, "each draws numbers of its own"


@pytest.mark.parametrize(
    ("how", "code", "said", "memory"),
    [
        ("raise", 1, "ValueError: as asked", False),
        ("exit", 7, "exit code 7", False),
        ("memory", 1, "MemoryError: too much", True),
        ("kill", -signal.SIGKILL, "last words", False),  # not the kernel: it counts its own
    ],
)
def test_how_it_ended(warm: str | None, how: str, code: int, said: str, memory: bool) -> None:
    ended = child.run(f"{ENTRIES}:fail", json.dumps(how), warm=warm)
    assert (ended.code, ended.said, ended.memory is not None, ended.answer) == (code, said, memory, None)


def test_a_deadline_ends_it_with_all_that_it_started(warm: str | None, tmp_path: Path) -> None:
    for seconds in (3, SOON_SECONDS):
        with pytest.raises(TimeoutError):
            child.run(f"{ENTRIES}:hang", json.dumps(str(tmp_path / "pids")), warm=warm, seconds=seconds)
        if (tmp_path / "pids").exists():  # else it didn't even get there, on a busy machine
            break
    own, helper = map(int, (tmp_path / "pids").read_text().split())
    assert wait_for(lambda: gone(own), GONE_SECONDS)
    if warm:
        assert wait_for(lambda: gone(helper), GONE_SECONDS)
    else:
        os.kill(helper, signal.SIGKILL)


def test_it_dies_with_whoever_asked(warm: str | None, tmp_path: Path) -> None:
    code = (
        "import json, sys; from workers.machine import child\n"
        f"child.run('{ENTRIES}:hang', json.dumps(sys.argv[1]), warm=sys.argv[2] or None)"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pids"), warm or ""])
    assert wait_for((tmp_path / "pids").exists, SOON_SECONDS)
    own, helper = map(int, (tmp_path / "pids").read_text().split())
    asking.kill()
    asking.wait()
    assert wait_for(lambda: gone(own), GONE_SECONDS)
    if warm:
        assert wait_for(lambda: gone(helper), GONE_SECONDS)
    else:
        os.kill(helper, signal.SIGKILL)


def test_an_interpreter_that_does_not_start() -> None:
    with pytest.raises(OSError, match="No such file"):
        child.run(f"{ENTRIES}:echo", "null", python="/nowhere/python")


def test_a_parent_that_is_gone_is_no_failure_but_a_note(tmp_path: Path) -> None:
    ended = child.run(f"{ENTRIES}:echo", "null", warm=str(tmp_path / "socket"))
    assert ended.answer is not None
    assert ended.note == f"not started warm: no parent at {tmp_path / 'socket'}"
