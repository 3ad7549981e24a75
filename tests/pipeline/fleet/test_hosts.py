"""Two hosts, as namespaces: networks joined by one cable, disks of their own. The cable is pulled while both work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.fleet.cluster import SLOW_START
from tests.limits import LONG_TEST_SECONDS, RUN_SECONDS
from tests.pipeline.runs import MARK, MODELS, command, marked_processes, wait_for, write_zoo

RAY = str(Path(sys.executable).with_name("ray"))
SESSIONS = Path("/tmp/ray")
# A host that doesn't answer is given up within seconds, not half a minute.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def allowed() -> bool:
    """Whether this user may make namespaces, cables and mounts."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "mount"))
    making = ["unshare", "--net", "--mount", "--uts", "ip", "link", "add", "x0", "type", "veth", "peer", "name", "x1"]
    return tools and subprocess.run(making, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not allowed(), reason="namespaces, veth or mounts aren't allowed here: run it as root"),
]


class Host:
    """A network, disks at ``out`` and for Ray, and a name of its own; the rest of the file system is shared."""

    def __init__(self, name: str, address: str, disk: Path, out: Path) -> None:
        self.name, self.address, self.disk = name, address, disk
        self.process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", f"hostname {name}; echo; exec sleep 86400"],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.process.stdout.close()
        for own, at in ((disk, out), (disk.with_name(f"ray-{name}"), SESSIONS)):
            own.mkdir()
            at.mkdir(exist_ok=True)
            self.run("mount", "--bind", str(own), str(at))

    def inside(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["nsenter", f"--target={self.process.pid}", "--net", "--mount", "--uts", f"--wd={Path.cwd()}", *words]

    def run(self, *words: str, environment: dict[str, str] | None = None) -> None:
        """Run a command there, to its end."""
        done = subprocess.run(self.inside(*words), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def plug(self, to: int) -> None:
        """Put its end of the cable in, which is ``eth0`` of that process's network."""
        if to != self.process.pid:
            ends = ["eth0", "type", "veth", "peer", "name", "eth0", "netns", f"/proc/{to}/ns/net"]
            self.run("ip", "link", "add", *ends)
        for words in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run("ip", *words.split())

    def unplug(self) -> None:
        """Pull its end of the cable out."""
        self.run("ip", "link", "set", "eth0", "down")


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        hosts = []
        for number, name in enumerate("ab", 1):
            hosts.append(Host(name, f"10.77.0.{number}", folder / f"disk-{name}", folder / "out"))
            stack.callback(hosts[-1].process.wait)
            stack.callback(hosts[-1].process.kill)
        first, second = hosts
        first.plug(to=second.process.pid)
        second.plug(to=second.process.pid)
        yield first, second


def events(host: Host) -> list[dict[str, object]]:
    """What the run's log says so far."""
    lines = [line for log in host.disk.glob("*/log.jsonl") for line in log.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def kept_on(first: Host, second: Host) -> list[dict[str, object]]:
    return [e for e in events(first) if (e["event"], e["stage"], e.get("node")) == ("ended", "keep", second.name)]


@pytest.mark.timeout(LONG_TEST_SECONDS)
def test_a_host_whose_cable_is_pulled_loses_no_artifact_that_was_kept(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny"), str(MODELS / "gpt2-tiny")], "bnb-fp4, bnb-nf4")
    text = zoo.read_text().replace("endpoint: loopback", f"endpoint: {tmp_path}/published")
    zoo.write_text(f"{text}storage: {tmp_path}/storage\n")
    environment = {**os.environ, **SLOW_START, **IMPATIENT, MARK: mark, "RAY_AUTH_MODE": "disabled"}
    with two_hosts(tmp_path) as (first, second):
        head = ["--head", "--port=6379", "--include-dashboard=false"]
        for host, role in ((first, head), (second, [f"--address={first.address}:6379"])):
            words = (RAY, "start", f"--node-ip-address={host.address}", "--num-cpus=1", "--disable-usage-stats")
            host.run(*words, *role, environment=environment)
        run = subprocess.Popen(
            first.inside(*command(zoo, tmp_path / "out"), "--address", f"{first.address}:6379"),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert wait_for(lambda: bool(kept_on(first, second)) or run.poll() is not None, RUN_SECONDS), events(first)
            second.unplug()
            lost = [event for event in kept_on(first, second) if event["event"] == "ended"]
            said = run.communicate(timeout=2 * RUN_SECONDS)[0]
        finally:
            run.kill()
            for process in marked_processes(mark):
                os.kill(process, 9)
        assert run.returncode == 0, said
    assert lost, said
    results = json.loads(next(first.disk.glob("*/results.json")).read_text())
    assert {entry["status"] for entry in results["artifacts"]} == {"published"}, said
    assert len(results["artifacts"]) == 4
    # The job was taken up by the other host, with the artifact as it was made: its record says how long that took.
    moved = str(lost[0]["model"])
    assert [e["event"] for e in events(first) if e["model"] == moved and e["stage"] == "fetch"].count("ended") == 2
    prints = {(entry["model"], entry["recipe"]): entry["fingerprint"][:16] for entry in results["artifacts"]}
    for event in lost:
        record = f"artifacts/{event['recipe']}-{prints[event['model'], event['recipe']]}.json"
        assert (first.disk / record).read_text() == (second.disk / record).read_text(), said
    published = list((tmp_path / "published").glob("acme/*/main.json"))
    assert len(published) == 4
    assert not list((tmp_path / "storage").rglob("*.safetensors"))
