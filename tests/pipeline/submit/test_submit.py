"""Submitted runs: on a real head with its dashboard, whose Python has our dependencies but not our packages."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.fleet.cluster import SLOW_START
from pipeline.submit import parcel, ray_jobs, submit
from pipeline.submit.ray_jobs import JobsClient, RayJob
from pipeline.zoo import zoo as zoos
from tests.limits import COMMAND_SECONDS, GONE_SECONDS, RAY_SECONDS, RUN_SECONDS, SOON_SECONDS
from tests.pipeline.runs import MARK, MODELS, ROOT, TEXT, marked_processes, wait_for
from workers.errors import TransientError, ZooError

OURS, THEIRS = "hf_plantedwhereitissubmitted", "hf_plantedonthecluster"

ZOO = """
name: tiny
models: [{{id: {model}}}]
recipes: [bnb-nf4]
verify: {{dataset: {{path: text, data_files: [{text}]}}, tokens: {tokens}, sequence_length: {length}}}
"""


def write_zoo(folder: Path, model: str = str(MODELS / "llama-tiny"), length: int = 64) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(ZOO.format(model=model, text=TEXT / "heldout.txt", length=length, tokens=8 * length))
    return path


# ------------------------------------------------------------------------------------------------ a real head


@dataclass(frozen=True)
class RealHead:
    """A Ray head, its dashboard's address, and where it keeps its logs."""

    address: str
    folder: Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[RealHead]:
    # Not below pytest's folders: the names of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="qm", dir="/tmp") as temporary:
        folder = Path(temporary)
        venv.create(folder / "env", symlinks=True)
        site = next((folder / "env" / "lib").glob("python*/site-packages"))
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        python = str(folder / "env" / "bin" / "python")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        there = subprocess.run(
            [python, "-c", "import ray, pipeline.cli"], cwd=folder, env=clean, capture_output=True, check=False
        )
        assert b"No module named 'pipeline.cli'" in there.stderr
        port, dashboard, agent, client = free_ports(4)
        environment = {
            **clean, "PATH": f"{folder}/env/bin:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0", **SLOW_START, "HF_TOKEN": THEIRS, MARK: folder.name,
        }  # fmt: skip
        log = (folder / "head.log").open("w")
        process = subprocess.Popen(
            [
                python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
                "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
                f"--port={port}", f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/ray",
            ],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        log.close()
        real = RealHead(f"http://127.0.0.1:{dashboard}", folder)
        try:
            assert wait_for(lambda: answers(real.address), RAY_SECONDS), (folder / "head.log").read_text()
            yield real
        finally:
            # `ray stop` and SIGTERM take five seconds more, for nobody.
            for number in marked_processes(folder.name):
                os.kill(number, signal.SIGKILL)
            process.wait(GONE_SECONDS)
            assert wait_for(lambda: not marked_processes(folder.name), GONE_SECONDS)


def answers(address: str) -> bool:
    try:
        return JobsClient(address, SOON_SECONDS).jobs() == []
    except (TransientError, ZooError):
        return False


def environment() -> dict[str, str]:
    hidden = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_TOKEN": OURS, "RAY_AUTH_MODE": "disabled"}


def quantmill(*arguments: object, seconds: float = RUN_SECONDS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


@contextmanager
def followed(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], TextIO, TextIO]]:
    """A command that goes on, with what it prints; killed at the end if it's still there."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments), "--follow"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/results.json"))]


class Cable:
    """A way to the head that can be cut: what is on it then is lost, and nothing gets through until it's mended."""

    def __init__(self, to: str) -> None:
        host, _, port = to.removeprefix("http://").partition(":")
        self._to = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.cut = False
        self._threads[0].start()

    def close(self) -> None:
        self.cut = True
        self._server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SOON_SECONDS)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._carry, args=(near,)))
            self._threads[-1].start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            if self.cut:
                return
            with socket.create_connection(self._to) as far:
                while not self.cut:
                    for source in select.select([near, far], [], [], 0.1)[0]:
                        piece = source.recv(1 << 16)
                        if not piece or self.cut:
                            return
                        (near if source is far else far).sendall(piece)


@pytest.mark.slow
def test_a_run_is_submitted_once_followed_over_a_cut_line_and_repeated(head: RealHead, tmp_path: Path) -> None:
    zoo, out = write_zoo(tmp_path / "zoo"), tmp_path / "runs"
    with closing(Cable(head.address)) as cable:
        asked = ("submit", zoo, "--address", cable.address, "--out", out)
        with followed(*asked) as (following, says, tells):
            name = says.readline().split()[1]
            again = quantmill("submit", zoo, "--address", head.address, "--out", out)
            assert f"{name} is at work already; nothing new was started" in again.stdout
            printed = ""
            for line in says:
                printed += line
                if "quantizing" in line:
                    cable.cut = True
                    break
            assert "trying again" in tells.readline(), printed
            cable.cut = False
            printed += says.read()
            assert following.wait(GONE_SECONDS) == 0, tells.read()

    ending = f"{name}: succeeded, exit code 0\n"
    assert printed == quantmill("logs", name, "--address", head.address).stdout + ending
    [result] = results(out)
    assert [(entry["model"], entry["status"]) for entry in result["artifacts"]] == [
        ("elsewhere/llama-tiny", "verified")
    ]
    assert printed.splitlines()[-3].startswith(str(out))

    repeated = quantmill("submit", zoo, "--address", head.address, "--out", out, "--follow")
    assert repeated.returncode == 0, repeated.stdout + repeated.stderr
    assert repeated.stdout.startswith(f"submitted {name}-2 ")
    assert [entry["status"] for entry in results(out)[-1]["artifacts"]] == ["skipped"]

    listed = quantmill("status", "--address", head.address).stdout.splitlines()
    assert [line.split()[:3] for line in listed[1:]] == [[f"{name}-2", "succeeded", "0"], [name, "succeeded", "0"]]
    said = json.dumps([job.model_dump() for job in JobsClient(head.address).jobs()])
    said += "".join(str(path.read_bytes()) for path in [*head.folder.glob("ray/session_2*/logs/**/*"), *out.glob("*/*")]
                    if path.is_file())  # fmt: skip
    assert name in said
    assert OURS not in said
    assert THEIRS not in said


@pytest.mark.slow
def test_the_exit_code_is_the_runs_own(head: RealHead, tmp_path: Path) -> None:
    broken = tmp_path / "no-tokenizer"
    shutil.copytree(MODELS / "llama-tiny", broken, ignore=shutil.ignore_patterns("tokenizer*"))

    def follow(name: str, zoo: Path, *options: str) -> subprocess.CompletedProcess[str]:
        return quantmill(
            "submit", zoo, "--address", head.address, "--out", tmp_path / name / "runs", "--follow", *options
        )

    wrong = write_zoo(tmp_path / "b")
    # What only a plan finds wrong with a zoo file: no Hub takes such a name.
    wrong.write_text(wrong.read_text() + f"publish: {{namespace: a..b, endpoint: 'file://{tmp_path}/hub'}}\n")
    with ThreadPoolExecutor(3) as pool:
        fails = pool.submit(follow, "a", write_zoo(tmp_path / "a", str(broken)))
        refuses = pool.submit(follow, "b", wrong)
        misses = pool.submit(follow, "c", write_zoo(tmp_path / "c"), "--python", "no-such-python")
        failing, refused, missing = fails.result(), refuses.result(), misses.result()
    assert failing.returncode == 1, failing.stdout + failing.stderr
    assert [entry["status"] for entry in results(tmp_path / "a" / "runs")[0]["artifacts"]] == ["failed"]
    assert failing.stdout.splitlines()[-1].endswith(": failed, exit code 1")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "change publish.namespace or publish.name" in refused.stdout
    assert missing.returncode == 1
    assert "no such Python on the head" in missing.stdout


@pytest.mark.slow
def test_following_can_end_before_the_run_and_the_run_by_cancelling(head: RealHead, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    name = quantmill(
        "submit", write_zoo(tmp_path / "zoo"), "--address", head.address, "--out", out
    ).stdout.split()[1]  # fmt: skip
    with followed("logs", name, "--address", head.address) as (following, says, tells):
        assert any("quantizing" in line for line in says)
        following.send_signal(signal.SIGINT)
        told = tells.read()
        assert following.wait(GONE_SECONDS) == 130
    assert f"{name} goes on; follow it again: quantmill logs {name} --address {head.address} --follow" in told
    assert f"quantmill cancel {name}" in told
    assert submit.find(JobsClient(head.address), name).status == "RUNNING"

    ended = quantmill("cancel", name, "--address", head.address)
    assert (ended.returncode, ended.stdout) == (0, f"{name}: stopped, exit code 130\n"), ended.stderr
    assert quantmill("cancel", name, "--address", head.address).stdout == ended.stdout
    after = quantmill("logs", name, "--address", head.address, "--follow")
    assert after.returncode == 130
    assert "interrupted; run the same command again to go on" in after.stdout
    assert "interrupted before it was finished" in results(out)[0]["artifacts"][0]["reason"]

    unknown = quantmill("logs", "quantmill-none", "--address", head.address)
    assert unknown.returncode == 2
    assert name in unknown.stderr
    with pytest.raises(TransientError, match="its head was started anew"):
        submit.follow(JobsClient(head.address), "quantmill-none", print, print)


@pytest.mark.slow
def test_an_answer_that_is_lost_starts_nothing_twice(head: RealHead, tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    loaded = zoos.load(zoo)

    class Lossy(JobsClient):
        def start(self, request: dict[str, Any]) -> None:
            super().start(request)
            assert wait_for(lambda: submit.find(self, request["submission_id"]).ended, RAY_SECONDS)
            raise TransientError("the line was cut")

    there = submit.submit(Lossy(head.address), loaded, parcel.pack(loaded, zoo), str(tmp_path), "no-such-python")
    assert not there.attached
    found = [job.submission_id for job in submit.submitted(JobsClient(head.address))]
    assert [name for name in found if name and name.startswith(there.name)] == [there.name]


@pytest.mark.slow
def test_many_who_submit_the_same_at_once_start_it_once(head: RealHead, tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    loaded, waiting = zoos.load(zoo), tmp_path / "waiting"
    packed = parcel.pack(loaded, zoo)
    waiting.write_text("#!/bin/sh\nexec sleep 86400\n")
    waiting.chmod(0o755)
    with ThreadPoolExecutor(6) as pool:
        asked = (JobsClient(head.address), loaded, packed, str(tmp_path), str(waiting))
        calls = [pool.submit(submit.submit, *asked) for _ in range(6)]
        [name] = {call.result().name for call in calls}
    found = [job for job in JobsClient(head.address).jobs() if (job.submission_id or "").startswith(name)]
    assert [(job.submission_id, job.ended) for job in found] == [(name, False)]
    assert submit.exit_code(submit.cancel(JobsClient(head.address), name)) == 130


# ------------------------------------------------------------------------------------------- wrong addresses


class Stranger(BaseHTTPRequestHandler):
    """A server that isn't Ray's; its first path segment says how."""

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        kind = self.path.split("/")[1]
        if kind == "slow":
            self.server.over.wait()  # type: ignore[attr-defined]
        codes = {"redirect": 302, "locked": 401, "other": 200, "failing": 500, "ray": 500}
        version = self.path == "/ray/api/version"
        self.send_response(200 if version else codes.get(kind, 404))
        if kind == "redirect":
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/other/")  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b'{"ray_version": "2.60.0"}' if version else b"{}")

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def stranger() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    server.seen, server.over = [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing", "doesn't exist; name the dashboard"),
        ("other", "is no Ray dashboard"),
        ("locked", "set RAY_AUTH_TOKEN"),
        ("redirect", "answered 302"),
        ("failing", "no Ray dashboard answers there"),
        ("slow", "no Ray dashboard answers there"),
    ],
)
def test_what_is_no_ray_head_is_told_apart(
    path: str, said: str, stranger: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "rays-own")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    patience = 0.5 if path == "slow" else SOON_SECONDS
    with pytest.raises(ZooError, match=said):
        JobsClient(f"http://127.0.0.1:{stranger.server_port}/{path}/", patience).check()
    assert stranger.seen == ["Bearer rays-own"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "address", ["head:6379", "ray://head:10001", "http://", "http://head:none", "http://[::1", "http://u:secret@head"]
)
def test_what_is_no_address_is_refused_without_showing_credentials(address: str) -> None:
    with pytest.raises(ZooError, match=r"^--address: ") as refused:
        JobsClient(address)
    assert "secret" not in str(refused.value)


def test_a_wrong_address_ends_with_2_at_once(tmp_path: Path) -> None:
    [port] = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    done = quantmill("submit", write_zoo(tmp_path), "--address", address, seconds=COMMAND_SECONDS)
    assert done.returncode == 2
    assert "nothing was started" in done.stderr


# ------------------------------------------------------------------------------------------------- the parcel


def test_the_parcel_holds_the_code_the_zoo_and_what_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    shutil.copytree(MODELS / "llama-tiny", folder / "models" / "own")
    (folder / "models" / "own" / ".env").write_text("HF_TOKEN=secret")
    (folder / "calibration.txt").write_text("inside")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "held.txt").write_text("outside")
    (tmp_path / "held.txt").write_text("of the same name")
    zoo = folder / "some zoo.yaml"
    zoo.write_text("""
name: mixed
models: [{id: models/own, recipes: [bnb-nf4]}, {id: org/name, revision: v1}, {id: /mnt/models/big}]
recipes: [bnb-nf4, {name: mine, method: gptq, scheme: {bits: 4, group_size: 64}, format: compressed-tensors}]
calibration: {dataset: {path: text, data_files: [calibration.txt, ../held.txt]}, samples: 8}
verify: {dataset: {path: text, data_files: [../text/held.txt]}, gates: {w4: {kl_mean: 0.5}}}
publish: {namespace: acme, endpoint: "file:///mnt/hub"}
""")
    loaded = zoos.load(zoo)
    packed = parcel.pack(loaded, zoo, [Path("/mnt/models/")])
    packed.write(tmp_path / "parcel.zip")
    with zipfile.ZipFile(tmp_path / "parcel.zip") as archive:
        archive.extractall(tmp_path / "there")
        names = set(archive.namelist())
    there = tmp_path / "there" / "zoo" / "some zoo.yaml"
    code = (
        "from pathlib import Path\nfrom pipeline.zoo import shipped, zoo\nprint(shipped.configs())\n"
        f"print(zoo.load(Path({str(there)!r})).model_dump_json())"
    )
    where, read = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert where == str(tmp_path / "there" / "pipeline" / "configs")
    arrived = zoos.Zoo.model_validate_json(read)
    assert [model.id for model in arrived.models] == ["models/own", "org/name", "/mnt/models/big"]
    assert arrived.calibration is not None
    files = [there.parent / name for name in arrived.calibration.dataset.data_files + arrived.verify.dataset.data_files]
    assert [path.read_text() for path in files] == ["inside", "of the same name", "outside"]
    same = {"calibration": loaded.calibration, "verify": loaded.verify, "models": loaded.models}
    assert arrived.model_copy(update=same) == loaded
    assert {name for name in names if name.startswith("zoo/models/")} == {
        f"zoo/models/own/{path.name}" for path in (MODELS / "llama-tiny").iterdir()
    }
    assert not [name for name in names if "__pycache__" in name or "/." in name]


def test_the_parcels_identity_is_its_content(tmp_path: Path) -> None:
    packed = {}
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "held.txt").write_text("text")
        (tmp_path / place / "zoo.yaml").write_text(ZOO.format(model="org/name", text="held.txt", length=64, tokens=512))
        packed[place] = parcel.pack(zoos.load(tmp_path / place / "zoo.yaml"), tmp_path / place / "zoo.yaml")
    one, two = packed.values()
    assert one.sha256() == two.sha256()
    (tmp_path / "two" / "zoo.yaml").write_text("# a remark\n" + (tmp_path / "two" / "zoo.yaml").read_text())
    assert parcel.pack(zoos.load(tmp_path / "two" / "zoo.yaml"), tmp_path / "two" / "zoo.yaml").sha256() == one.sha256()
    (tmp_path / "two" / "held.txt").write_text("another text")
    assert two.sha256() != one.sha256()
    assert submit.command(one, "/out", "python") != submit.command(one, "/elsewhere", "python")


def test_what_cannot_travel_is_refused_with_the_remedy(tmp_path: Path) -> None:
    big = tmp_path / "big"
    shutil.copytree(MODELS / "llama-tiny", big)
    with (big / "more.json").open("wb") as stream:
        stream.truncate(parcel.LIMIT)
    zoo = write_zoo(tmp_path / "zoo", str(big))
    with pytest.raises(ZooError, match=r"largest is .*more\.json.*--shared"):
        parcel.pack(zoos.load(zoo), zoo)
    assert parcel.pack(zoos.load(zoo), zoo, [tmp_path]).bytes < 5e6
    (note,) = parcel.pack(zoos.load(zoo := write_zoo(tmp_path / "zoo", "./none")), zoo).notes
    assert re.search(r"no such folder, got '\./none'.*--shared", note), "one missing model fails alone, there"
    with pytest.raises(ZooError, match="expected an absolute path, got 'models'"):
        parcel.pack(zoos.load(zoo), zoo, [Path("models")])


def test_loopback_and_relative_folders_are_refused(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path)
    with pytest.raises(ZooError, match="which Ray deletes"):
        submit.check(zoos.load(zoo), "runs")
    zoo.write_text(zoo.read_text() + "publish: {endpoint: loopback, namespace: acme}\n")
    with pytest.raises(ZooError, match="the loopback Hub"):
        submit.check(zoos.load(zoo), "~/runs")


def test_the_shell_sees_each_argument_as_it_is(tmp_path: Path) -> None:
    packed = parcel.Parcel("zoo/a b'c.yaml", b"", {})
    (tmp_path / "py").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "py").chmod(0o755)
    said = subprocess.run(
        submit.command(packed, "~/my $runs", str(tmp_path / "py")), shell=True, env={"HOME": "/home/me"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[3:] == ["zoo/a b'c.yaml", "--out", "/home/me/my $runs", "--address", "auto"]


# ------------------------------------------------------------------------------------------- pure decisions


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ({}, ("q-1a", False)),
        ({"q-2b": "RUNNING", "q-1a-x": "RUNNING"}, ("q-1a", False)),
        ({"q-1a": "PENDING"}, ("q-1a", True)),
        ({"q-1a": "SUCCEEDED"}, ("q-1a-2", False)),
        ({"q-1a": "FAILED", "q-1a-2": "RUNNING"}, ("q-1a-2", True)),
        ({"q-1a": "FAILED", "q-1a-10": "STOPPED", "q-1a-9": "STOPPED"}, ("q-1a-11", False)),
        ({"q-1a-3": "STOPPED"}, ("q-1a-4", False)),
    ],
)
def test_the_next_name(known: dict[str, str], chosen: tuple[str, bool]) -> None:
    assert submit.choose("q-1a", [RayJob(submission_id=k, status=v) for k, v in known.items()]) == chosen


@pytest.mark.parametrize(
    ("status", "code", "message", "ends"),
    [
        ("SUCCEEDED", 0, None, 0),
        ("FAILED", 1, None, 1),
        ("FAILED", 2, None, 2),
        ("FAILED", 130, None, 130),
        ("FAILED", -9, None, 1),
        ("FAILED", None, "Job entrypoint command failed with exit code 2, last available logs", 2),
        ("FAILED", None, "runtime_env setup failed", 1),
        ("STOPPED", None, None, 130),
    ],
)
def test_exit_codes(status: str, code: int | None, message: str | None, ends: int) -> None:
    job = RayJob(submission_id="q", status=status, driver_exit_code=code, message=message)
    assert submit.exit_code(job) == ends
    assert status.lower() in submit.ending(job)


def test_following_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.1)
    [port] = free_ports(1)
    told: list[str] = []
    with pytest.raises(TransientError, match="the run may well go on"):
        submit.follow(JobsClient(f"http://127.0.0.1:{port}", 0.5), "q", print, told.append)
    assert len(told) == 1
    assert "trying again" in told[0]


def test_a_head_that_fails_to_take_a_run_is_to_be_asked_again(
    stranger: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    address = f"http://127.0.0.1:{stranger.server_port}/ray"
    done = CliRunner().invoke(main, ["submit", str(write_zoo(tmp_path)), "--address", address])
    assert done.exit_code == 75
    assert "answered 500" in done.output
    assert "it starts nothing twice" in done.output
    assert len(stranger.seen) == 1 + submit.ATTEMPTS  # type: ignore[attr-defined]


def test_no_request_waits_longer_than_its_deadline() -> None:
    """Neither for a server that accepts and says nothing, nor for one whose answer never ends."""
    assert ray_jobs.SECONDS <= 60
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started = time.monotonic()
        with pytest.raises(TransientError):
            JobsClient(f"http://127.0.0.1:{mute.getsockname()[1]}", 0.5).jobs()
        assert time.monotonic() - started < ray_jobs.SECONDS, "its own deadline ended it"

    def drip(server: socket.socket) -> None:
        near, _ = server.accept()
        with near:
            near.recv(1 << 16)
            near.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            try:
                while True:
                    near.sendall(b" ")
                    time.sleep(0.1)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as endless:
        thread = threading.Thread(target=drip, args=(endless,))
        thread.start()
        with pytest.raises(TransientError, match="didn't end in time"):
            JobsClient(f"http://127.0.0.1:{endless.getsockname()[1]}", 0.5).jobs()
        thread.join(SOON_SECONDS)
        assert not thread.is_alive()
