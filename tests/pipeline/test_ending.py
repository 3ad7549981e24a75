"""A run ends with its results, whatever ends it."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ending, session
from pipeline.cli.main import main
from pipeline.fleet.cluster import SLOW_START
from pipeline.fleet.head import connect
from pipeline.report.results import Results
from tests.limits import AGENTS_SECONDS, GONE_SECONDS, RUN_SECONDS, SOON_SECONDS
from tests.pipeline.fleet.test_cluster import START as CLUSTER
from tests.pipeline.receiver import Receiver
from tests.pipeline.runs import MARK, MODELS, ROOT, command, marked_processes, wait_for, write_zoo
from tests.pipeline.simulated import SimulatedFleet, node, plan_of, size
from workers.errors import ClusterLost, HubRefused, HubUnavailable, ZooError
from workers.transfer import reach

PLAN = plan_of([size(1), size(1)], "bnb-nf4", "rtn-w4-g128")


@pytest.fixture(autouse=True)
def _leases(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class Ends(SimulatedFleet):
    """A fleet that raises an error at the n-th call of one of its methods."""

    def __init__(self, where: str, after: int, error: BaseException) -> None:
        super().__init__([node("a")])
        self._where, self._left, self._error = where, after, error

    def _call(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        if name == self._where:
            self._left -= 1
            if self._left < 0:
                raise self._error
        return action(*arguments)

    def __enter__(self) -> "Ends":
        self._call("enter", lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._call("exit", lambda: None)

    def nodes(self) -> Any:
        return self._call("nodes", super().nodes)

    def probe(self, *arguments: Any) -> Any:
        return self._call("probe", super().probe, *arguments)

    def start(self, *arguments: Any) -> Any:
        return self._call("start", super().start, *arguments)

    def wait(self, seconds: float) -> Any:
        return self._call("wait", super().wait, seconds)


ERRORS = [
    KeyError("a bug"), RuntimeError("Ray"), MemoryError(), OSError(28, "No space left on device"), KeyboardInterrupt(),
    SystemExit(15), ZooError("no cluster there"), HubRefused("token"), ClusterLost("its head died"),
    sqlite3.OperationalError("locked"), RecursionError(), ValueError("\x1b[31m"),
]  # fmt: skip


@settings(max_examples=25)
@given(where=st.sampled_from(["enter", "nodes", "probe", "start", "wait", "exit"]), after=st.integers(0, 14),
       error=st.sampled_from(ERRORS))  # fmt: skip
def test_whatever_ends_the_driver_its_results_are_written(
    tmp_path_factory: pytest.TempPathFactory, where: str, after: int, error: BaseException
) -> None:
    out = tmp_path_factory.mktemp("out")
    fleet = Ends(where, after, error)
    finished = session.run(PLAN, out, None, [], start=lambda *_: fleet)  # type: ignore[arg-type, return-value]
    assert finished.results_path is not None
    results = Results.model_validate_json(finished.results_path.read_text())
    assert results == finished.results
    assert finished.report_path is not None
    assert "<h1>" in finished.report_path.read_text()
    published = sum(step.stage == "publish" for _, event, _, step in fleet.log if event == "ended")
    statuses = [entry.status for entry in results.artifacts]
    assert statuses.count("failed") == 4 - statuses.count("published")
    assert published - 1 <= statuses.count("published") <= published
    with sqlite3.connect(out / "ledger.sqlite") as ledger:
        ((finished_at, status),) = ledger.execute("SELECT finished_at, status FROM runs").fetchall()
    ledger.close()
    assert finished_at
    reached = fleet._left < 0
    if not reached:
        assert (finished.exit_code, results.status, status, results.error) == (0, "ok", "ok", None)
        return
    assert results.status == "failed"
    assert results.error is not None
    for entry in results.artifacts:
        assert (entry.commit is not None) == (entry.status == "published")
        assert entry.status == "published" or "run the zoo again" in (entry.reason or "")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        assert (finished.exit_code, status) == (130, "interrupted")
    else:
        assert finished.exit_code == (2 if isinstance(error, ZooError | HubRefused) and where == "enter" else 1)
        log = [json.loads(line) for line in (finished.results_path.parent / "log.jsonl").read_text().splitlines()]
        assert log[-1]["event"] == "over"
        assert type(error).__name__ in log[-1]["traceback"]
    assert sorted(path.name for path in finished.results_path.parent.iterdir()) == [
        "log.jsonl", "report.html", "results.json",
    ]  # fmt: skip
    assert not ending.at_work(out)


def test_the_webhook_is_told_of_a_bug_in_one_sentence(tmp_path: Path, receiver: Receiver) -> None:
    fleet = Ends("wait", 4, KeyError("a bug"))
    session.run(PLAN, tmp_path, None, [], receiver.url, lambda *_: fleet)  # type: ignore[arg-type, return-value]
    (told,) = receiver.got
    assert told["status"] == "failed"
    assert told["text"].splitlines()[1] == "KeyError: 'a bug'"
    assert sum(told["artifacts"].values()) == 4


def test_a_watcher_that_fails_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def started(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

        ended = started

    fleet = Ends("never", 0, KeyError())
    finished = session.run(PLAN, tmp_path, None, [Broken()], start=lambda *_: fleet)  # type: ignore[arg-type, return-value, list-item]
    assert finished.exit_code == 0
    assert capfd.readouterr().err.count("No space left") == 1


# ------------------------------------------------------------------------------------- what nothing was started for


def wrong_zoo(folder: Path) -> Path:
    return write_zoo(folder, [str(MODELS / "llama-tiny")], "no-such-recipe")


def impossible_plan(folder: Path) -> Path:
    zoo = write_zoo(folder, [str(MODELS / "llama-tiny")], "bnb-nf4")
    zoo.write_text(zoo.read_text().replace("heldout.txt", "nowhere.txt"))
    return zoo


@pytest.mark.parametrize("make", [wrong_zoo, impossible_plan, lambda folder: folder / "none.yaml"])
def test_exit_code_2_calls_the_webhook_and_leaves_nothing(
    tmp_path: Path, receiver: Receiver, make: Callable[[Path], Path]
) -> None:
    arguments = ["run", str(make(tmp_path)), "--out", str(tmp_path / "runs"), "--webhook", receiver.url]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert "quantmill: " in done.stderr
    assert "ZooError" not in done.stderr
    (told,) = receiver.got
    assert told["status"] == "failed"
    assert "ZooError: " in told["text"]
    assert told["artifacts"] == {}
    assert set(told) == {
        "text", "run_id", "zoo", "status", "started_at", "finished_at", "artifacts", "not_accepted", "results",
    }  # fmt: skip
    assert not list(tmp_path.glob("runs/*/results.json"))


def test_a_dry_run_is_no_run_for_the_webhook(tmp_path: Path, receiver: Receiver) -> None:
    done = CliRunner().invoke(main, ["run", str(wrong_zoo(tmp_path)), "--dry-run", "--webhook", receiver.url])
    assert done.exit_code == 2
    assert not receiver.got


def test_a_folder_at_work_is_refused_and_told(tmp_path: Path, receiver: Receiver) -> None:
    with ending.lock(tmp_path) as alone:
        assert alone
        finished = session.run(PLAN, tmp_path, None, [], receiver.url)
    assert finished.exit_code == 2
    assert finished.results_path is None
    assert "another run is at work" in receiver.got[0]["text"]


# ---------------------------------------------------------------------------------------------- signals, kills


class Silent(ThreadingHTTPServer):
    """A Hub that answers at its first page, and nothing else."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Silent)
        self.asked = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Silent(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        if self.path == "/":
            self.send_response(200)
            self.end_headers()
        else:
            self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Silent)
        server.asked.set()
        time.sleep(RUN_SECONDS)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_planning_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    zoo = write_zoo(tmp_path, ["org/a", "org/b"], "bnb-nf4")
    hub = Silent()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        process = subprocess.Popen(
            command(zoo, tmp_path / "runs"),
            env={**os.environ, "HF_ENDPOINT": hub.url}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert hub.asked.wait(SOON_SECONDS)
            process.send_signal(number)
            said, _ = process.communicate(timeout=SOON_SECONDS)
        finally:
            process.kill()
    finally:
        hub.shutdown()
        hub.server_close()
    assert process.returncode == 130, said
    results = Results.model_validate_json(Path(said.strip().splitlines()[-2]).read_text())
    assert (results.status, results.artifacts) == ("failed", ())
    assert "interrupted" in CliRunner().invoke(main, ["status", "--out", str(tmp_path / "runs")]).output


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import session
from tests.pipeline.test_ending import PLAN, Ends

class Killed(Ends):
    def wait(self, seconds):
        if sum(step.stage == "publish" for _, event, _, step in self.log if event == "ended") == 2:
            print("at work:", session.at_work(Path(sys.argv[1])), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().wait(seconds)

session.run(PLAN, Path(sys.argv[1]), None, [], start=lambda *_: Killed("never", 0, KeyError()))
"""


def test_a_killed_driver_shows_as_died_and_its_report_is_found(tmp_path: Path) -> None:
    def status() -> str:
        return CliRunner().invoke(main, ["status", "--out", str(tmp_path)]).output.splitlines()[-1].split()[-1]

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == "at work: True\n"
    (left,) = tmp_path.glob("*/unfinished.json")
    assert status() == "died"
    done = CliRunner().invoke(main, ["report", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip()).parent == left.parent
    results = Results.model_validate_json((left.parent / "results.json").read_text())
    assert sorted(entry.status for entry in results.artifacts) == ["failed", "failed", "published", "published"]
    assert results.error is not None
    assert results.error.kind == "DriverDied"
    assert [path.name for path in left.parent.glob("*.json")] == ["results.json"]
    # The next run records it, and goes on.
    assert session.run(PLAN, tmp_path, None, [], start=lambda *_: Ends("never", 0, KeyError())).exit_code == 0  # type: ignore[arg-type, return-value]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.execute("SELECT status FROM runs ORDER BY rowid").fetchall() == [("died",), ("ok",)]
    ledger.close()


FULL = """
import resource, sys
from pathlib import Path
from pipeline import session
from tests.pipeline.test_ending import PLAN, Ends

class Full(Ends):
    def wait(self, seconds):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file can grow any more
        return super().wait(seconds)

finished = session.run(PLAN, Path(sys.argv[1]), None, [], sys.argv[2], lambda *_: Full("wait", 3, KeyError("bug")))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(finished.exit_code, len(finished.results.artifacts), finished.notices)
"""


def test_where_nothing_can_be_written_the_webhook_and_the_exit_code_still_tell(
    tmp_path: Path, receiver: Receiver
) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), receiver.url],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("1 4 "), done.stderr
    assert "results.json can't be written" in done.stdout
    assert receiver.got[0]["status"] == "failed"


@pytest.mark.parametrize(
    "vital", [pytest.param("gcs_server", marks=pytest.mark.slow), pytest.param("raylet", marks=pytest.mark.night)]
)
def test_a_head_that_dies_ends_the_run_with_its_results(tmp_path: Path, receiver: Receiver, vital: str) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4")
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*command(zoo, tmp_path / "runs"), "--webhook", receiver.url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "verifying" in line:
            names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in marked_processes(mark)}
            os.kill(next(pid for pid, name in names.items() if name == vital), signal.SIGKILL)
            break
    said, complaints = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1, said + complaints
    assert f"quantmill: Ray's head on this machine died ({vital} ended)" in complaints
    results = Results.model_validate_json(Path(said.strip().splitlines()[-2]).read_text())
    assert results.error is not None
    assert results.error.kind == "ClusterLost"
    assert receiver.got[0]["text"].splitlines()[1].startswith("ClusterLost")
    assert wait_for(lambda: not marked_processes(mark), AGENTS_SECONDS), marked_processes(mark)


@pytest.mark.slow
def test_the_head_of_a_cluster_that_dies_ends_the_run_before_ray_ends_the_driver(tmp_path: Path) -> None:
    """Ray ends a driver's process, without a word to Python, once its head was silent for a minute."""
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4")
    zoo.write_text("\n".join(line for line in zoo.read_text().splitlines() if not line.startswith("publish:")))
    mark = uuid.uuid4().hex
    environment = {**os.environ, **SLOW_START, "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**environment, MARK: mark},
    )  # fmt: skip
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = next(line.strip() for line in head.stdout if ":" in line and " " not in line.strip())
        run = [*command(zoo, tmp_path / "runs"), "--address", address]
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        for line in process.stdout:
            if "quantizing" in line:
                names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in marked_processes(mark)}
                os.kill(next(pid for pid, name in names.items() if name == "gcs_server"), signal.SIGKILL)
                break
        said, complaints = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 1, said + complaints
        assert f"quantmill: Ray's head at {address} doesn't answer any more" in complaints
        assert Results.model_validate_json(Path(said.strip().splitlines()[-2]).read_text()).error is not None
    finally:
        head.stdin.close()
        head.stdout.close()
        head.wait(GONE_SECONDS)


# ------------------------------------------------------------------------------- addresses where nothing answers


@pytest.fixture
def listening() -> Iterator[int]:
    """A port where connections are accepted, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def never(address: str) -> None:
    raise AssertionError("it must not be asked to connect")


def test_a_cluster_that_does_not_answer_is_said_soon(listening: int, free_port: int) -> None:
    begun = time.monotonic()
    for address, why in (
        (f"127.0.0.1:{free_port}", "refused"),
        (f"ray://127.0.0.1:{free_port}", "refused"),
        ("nowhere.invalid:6379", "nothing answers"),
        (f"127.0.0.1:{listening}", "doesn't speak as a Ray head does"),
    ):
        with pytest.raises(ZooError, match=why) as caught:
            connect(address, never, seconds=2)
        assert address in str(caught.value)
    assert time.monotonic() - begun < SOON_SECONDS


def test_a_hub_that_does_not_answer_is_said_soon(listening: int, free_port: int) -> None:
    begun = time.monotonic()
    for port in (listening, free_port):
        with pytest.raises(HubUnavailable, match=rf"HF_ENDPOINT: nothing answers at 'http://127.0.0.1:{port}'"):
            reach.check(f"http://127.0.0.1:{port}", "HF_ENDPOINT", seconds=1.5)
    assert time.monotonic() - begun < SOON_SECONDS


def test_whatever_a_hub_answers_is_an_answer(receiver: Receiver) -> None:
    reach.check(receiver.url, "HF_ENDPOINT", seconds=1.5)  # 501: it takes POST alone


def test_an_outage_at_the_start_is_not_the_zoos_fault(tmp_path: Path, free_port: int, receiver: Receiver) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4")
    zoo.write_text(zoo.read_text().replace("endpoint: loopback", f"endpoint: 'http://127.0.0.1:{free_port}'"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "REACH_SECONDS", 1.0)
        done = CliRunner().invoke(main, ["run", str(zoo), "--out", str(tmp_path / "runs"), "--webhook", receiver.url])
    assert done.exit_code == 1, done.output
    assert "publish.endpoint: nothing answers" in done.stderr
    assert "publish.endpoint: nothing answers" in receiver.got[0]["text"]
