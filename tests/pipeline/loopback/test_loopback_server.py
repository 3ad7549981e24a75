"""The loopback Hub as a server: its folder, its thread, its death, and requests that no client would send."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi

from pipeline.loopback import LoopbackHub
from tests.limits import GONE_SECONDS, SOON_SECONDS
from tests.pipeline.runs import wait_for
from workers.errors import UserError

REPO = "team/model"
ANY = "hf_anything"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as hub:
        HfApi(endpoint=hub.endpoint, token=ANY).create_repo(REPO)
        yield hub


def test_state_survives_a_restart(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=ANY)
        api.create_repo(REPO, private=True)
        publish(hub.endpoint, 1)
        api.create_tag(REPO, tag="v1")
        publish(hub.endpoint, 2)
        oid = head(api)
    with LoopbackHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=ANY)
        assert (head(api), api.repo_info(REPO).private) == (oid, True)
        for revision, n in ("v1", 1), (oid, 2):
            assert fetch(hub.endpoint, revision, "model.safetensors") == content(n)


def test_a_root_and_a_port_have_one_server(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        with pytest.raises(UserError, match="in use by another server"):
            LoopbackHub(hub.root)
        with pytest.raises(UserError, match="choose another port"):
            LoopbackHub(tmp_path / "second", port=int(hub.endpoint.rsplit(":", 1)[1]))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "mine").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        LoopbackHub(tmp_path)
    assert (tmp_path / "incoming" / "mine").exists()


def test_close_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with LoopbackHub(tmp_path / "hub") as hub:
        assert HfApi(endpoint=hub.endpoint, token=ANY).whoami()["type"] == "user"
    # The worker threads were told to stop when the loop ended; they take an instant to.
    assert wait_for(lambda: set(threading.enumerate()) <= before, SOON_SECONDS)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(hub.endpoint)


def start_server(root: Path) -> tuple[subprocess.Popen[str], HfApi]:
    code = "import sys; from pathlib import Path; from pipeline.loopback import serve; serve(Path(sys.argv[1]), 0)"
    server = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, HfApi(endpoint=server.stdout.readline().split()[3].rstrip(","), token=ANY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_at_a_signal(tmp_path: Path, number: int) -> None:
    server, api = start_server(tmp_path / "hub")
    api.create_repo(REPO)
    server.send_signal(number)
    output, _ = server.communicate(timeout=GONE_SECONDS)
    assert (server.returncode, output) == (0, "")


def content(n: int) -> bytes:
    return n.to_bytes(4, "big") * 10_000


def fetch(endpoint: str, revision: str, name: str) -> bytes:
    return httpx2.get(f"{endpoint}/{REPO}/resolve/{revision}/{name}").raise_for_status().content


def head(api: HfApi) -> str:
    return api.list_repo_commits(REPO)[0].commit_id


def publish(endpoint: str, n: int) -> None:
    """The same bytes as an LFS and as a regular file, in one commit; the client would retry for half a minute."""
    data = content(n)
    oid = hashlib.sha256(data).hexdigest()
    lines = [
        {"key": "header", "value": {"summary": f"number {n}"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": oid}},
        {"key": "file", "value": {"path": "same.txt", "content": base64.b64encode(data).decode()}},
    ]
    with httpx2.Client(base_url=endpoint) as http:
        batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
        answer = http.post(f"/{REPO}.git/info/lfs/objects/batch", json=batch).json()
        if (actions := answer["objects"][0].get("actions")) is not None:
            http.put(actions["upload"]["href"], content=data).raise_for_status()
        body = "\n".join(map(json.dumps, lines))
        http.post(f"/api/models/{REPO}/commit/main", content=body).raise_for_status()


def publish_from(endpoint: str, n: int, confirmed: list[int]) -> None:
    while True:
        publish(endpoint, n)
        confirmed.append(n)
        n += 1


def test_a_kill_at_any_instant_leaves_whole_commits(tmp_path: Path) -> None:
    moments = random.Random(1)
    landed = kills = 0
    while kills < 5 or not landed:
        kills += 1
        server, api = start_server(tmp_path / "hub")
        api.create_repo(REPO, exist_ok=True)
        killer = threading.Timer(moments.uniform(0.05, 0.3), server.kill)
        killer.start()
        confirmed = [landed]
        with pytest.raises(httpx2.TransportError):
            publish_from(api.endpoint, landed + 1, confirmed)
        killer.join()
        server.communicate()
        landed = count_whole_commits(tmp_path / "hub")
        # At most the one whose answer was lost has landed besides.
        assert landed in (confirmed[-1], confirmed[-1] + 1)


def count_whole_commits(root: Path) -> int:
    with LoopbackHub(root) as hub:
        commits = [c.commit_id for c in HfApi(endpoint=hub.endpoint, token=ANY).list_repo_commits(REPO)][:-1]
        for n, commit in enumerate(reversed(commits), 1):
            for name in ("model.safetensors", "same.txt"):
                assert fetch(hub.endpoint, commit, name) == content(n)
        return len(commits)


def test_put_of_other_bytes_is_refused(hub: LoopbackHub) -> None:
    data = content(1)
    sha256 = hashlib.sha256(data).hexdigest()
    body = {"operation": "upload", "objects": [{"oid": sha256, "size": len(data)}]}
    url = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    actions = httpx2.post(url, json=body).json()["objects"][0]["actions"]
    href = actions["upload"]["href"]
    for wrong in (data[:-1], data[:-1] + b"?", data + b"!"):
        assert httpx2.put(href, content=wrong).status_code == 400
    forged = href.replace(f"size={len(data)}", "size=5")
    assert "not one that this Hub gave out" in httpx2.put(forged, content=b"12345").json()["error"]
    assert httpx2.post(actions["verify"]["href"], json=body["objects"][0]).status_code == 400
    assert not list((hub.root / "objects").rglob(sha256))
    assert httpx2.put(href, content=data).status_code == 200
    assert httpx2.post(actions["verify"]["href"], json=body["objects"][0]).status_code == 200


@pytest.mark.parametrize("path", ["../a", "/a", "a//b", "a/./b", ".git/config", "a\nb", "", "same.txt/a"])
def test_paths_that_git_cannot_hold_are_refused(hub: LoopbackHub, path: str) -> None:
    publish(hub.endpoint, 1)
    lines = [
        {"key": "header", "value": {"summary": "bad"}},
        {"key": "file", "value": {"path": path, "encoding": "base64", "content": ""}},
    ]
    body = "\n".join(map(json.dumps, lines))
    assert httpx2.post(f"{hub.endpoint}/api/models/{REPO}/commit/main", content=body).status_code == 400


def test_web_pages_may_not_write(hub: LoopbackHub) -> None:
    url = f"{hub.endpoint}/api/repos/create"
    assert httpx2.post(url, json={"name": "x"}, headers={"Origin": "http://evil"}).status_code == 400
    assert httpx2.post(url, json={"name": "x"}, headers={"Host": "evil.example"}).status_code == 400
