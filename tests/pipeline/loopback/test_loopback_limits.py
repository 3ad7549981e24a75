"""The loopback Hub bounds what it is sent, refuses what it can't store, and tells no names apart by case alone."""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loopback import Limits, LoopbackHub
from pipeline.loopback.errors import InvalidRequest
from pipeline.loopback.tree import check_path
from workers.transfer.hub import connect

LIMITS = Limits(object_bytes=10**6, commit_bytes=2**16)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), limits=LIMITS) as hub:
        HfApi(endpoint=hub.endpoint).create_repo("Acme/Model")
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=hub.endpoint, timeout=30) as client:
        yield client


def commit(client: httpx2.Client, path: str, data: bytes, repo: str = "Acme/Model") -> httpx2.Response:
    content = base64.b64encode(data).decode()
    lines = [{"key": "header", "value": {"summary": "a"}}, {"key": "file", "value": {"path": path, "content": content}}]
    body = "\n".join(json.dumps(line) for line in lines)
    return client.post(f"/api/models/{repo}/commit/main", content=body.encode())


# ------------------------------------------------------------------------------------------------------ sizes


def test_bodies_are_bounded(client: httpx2.Client) -> None:
    assert commit(client, "small", b"x" * 2**10).status_code == 200
    assert commit(client, "large", b"x" * 2**16).status_code == 413
    answer = client.post("/api/validate-yaml", content=b"x" * (8 * 2**20 + 1))
    assert answer.status_code == 413
    assert "expected at most" in answer.json()["error"]
    assert client.get("/").status_code == 200, "and it goes on"


@pytest.mark.parametrize("size", [10**6 + 1, 2**70, -1])
def test_files_that_are_announced_too_large_are_refused(client: httpx2.Client, size: int) -> None:
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "0" * 64, "size": size}]}
    assert client.post("/Acme/Model.git/info/lfs/objects/batch", json=body).status_code == 413


def test_regular_files_have_the_hubs_limit(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub, httpx2.Client(base_url=hub.endpoint, timeout=30) as client:
        HfApi(endpoint=hub.endpoint).create_repo("Acme/Model")
        assert commit(client, "a.txt", b"x" * (10 * 2**20)).status_code == 200
        assert commit(client, "a.txt", b"x" * (10 * 2**20 + 1)).status_code == 413


# ------------------------------------------------------------------------------------------------------ names

ODD = st.sampled_from(["..", ".", "", ".git", ".GIT", "a" * 256, "é" * 128, "a\x00", "a\n", "\x7f", "\x9b", "\ud800"])


@given(before=st.lists(st.sampled_from("ab"), max_size=2), odd=ODD, after=st.lists(st.sampled_from("ab"), max_size=2))
def test_paths_that_cannot_be_stored_are_refused(before: list[str], odd: str, after: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_path("/".join([*before, odd, *after]))


@settings(max_examples=60)
@given(path=st.text(max_size=40) | st.lists(st.text("ab.-é/ \\", max_size=9), max_size=4).map("/".join))
def test_a_path_is_refused_or_comes_back(client: httpx2.Client, path: str) -> None:
    answer = commit(client, path, path.encode(errors="replace"))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        got = client.get(f"/Acme/Model/resolve/main/{quote(path, safe='/')}")
        assert (got.status_code, got.content) == (200, path.encode())


NAMES = st.sampled_from([
    "..", ".", "a/b", "a--b", "a..b", "x.git", "x.ipynb", "-a", "a-", ".a", "a" * 97, "é", "a b", "a\n", "",
    "%2e%2e", "~",
])  # fmt: skip


@given(name=NAMES, namespace=st.sampled_from(["acme", "api", "API", "..", "", "a b", "models"]))
def test_repositories_that_cannot_be_are_refused(
    hub: LoopbackHub, client: httpx2.Client, name: str, namespace: str
) -> None:
    before = sorted(path for path in hub.root.rglob("repo.json"))
    answer = client.post("/api/repos/create", json={"name": name, "organization": namespace})
    assert answer.status_code == 400, answer.text
    assert sorted(path for path in hub.root.rglob("repo.json")) == before


def test_refs_too_long_for_a_file_are_refused(client: httpx2.Client) -> None:
    name = "a/" * 75
    assert client.post("/api/models/Acme/Model/tag/main", json={"tag": f"{name}a"}).status_code == 400
    assert client.get(f"/api/models/Acme/Model/revision/{quote(name + 'a', safe='')}").status_code == 404


# ------------------------------------------------------------------------------------------------------- case


@settings(max_examples=25)
@given(flips=st.lists(st.booleans(), min_size=10, max_size=10))
def test_a_name_in_another_case_is_the_same_repository(
    hub: LoopbackHub, client: httpx2.Client, flips: list[bool]
) -> None:
    letters = zip("Acme/Model", flips, strict=True)
    name = "".join(letter.swapcase() if flip else letter for letter, flip in letters)
    api = connect(hub.endpoint)
    assert api.model_info(name).id == "Acme/Model"
    assert api.create_repo(name, exist_ok=True).repo_id == "Acme/Model"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(name)
    assert commit(client, "shared", b"x", name).status_code == 200
    assert "shared" in api.list_repo_files("Acme/Model")
    assert [path.parent.name for path in hub.root.glob("models/*/*/repo.json")].count("Model") == 1


def test_a_namespace_in_another_case_is_the_same_too(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        api = connect(hub.endpoint)
        api.create_repo("Acme/one")
        assert api.create_repo("aCME/two").repo_id == "Acme/two"
        assert sorted(model.id for model in api.list_models(author="acme")) == ["Acme/one", "Acme/two"]
        api.move_repo("acme/ONE", "acme/One")
        assert api.model_info("ACME/one").id == "Acme/One"
        with pytest.raises(HfHubHTTPError):
            api.move_repo("Acme/two", "Acme/oNe")


# ---------------------------------------------------------------------------------------------- any body at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([
            "name", "organization", "type", "files", "path", "size", "sample", "operation", "objects", "oid", "tag",
            "message", "key", "value", "summary", "content", "parentCommit", "title", "namespace", "item", "id",
            "parts", "fromRepo", "toRepo", "gated", "visibility", "startingPoint", "paths", "description",
        ]), inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
BODIES = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40) | st.just(b'{"a":' * 20_000)
PLACES = [
    ("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", "/api/repos/move"),
    ("PUT", "/api/models/Acme/Model/settings"), ("POST", "/api/models/Acme/Model/paths-info/main"),
    ("POST", "/api/models/Acme/Model/tag/main"), ("POST", "/api/models/Acme/Model/branch/b"),
    ("POST", "/api/collections"), ("POST", "/api/models/Acme/Model/preupload/main"),
    ("POST", "/api/models/Acme/Model/commit/main"), ("POST", "/Acme/Model.git/info/lfs/objects/batch"),
    ("POST", "/lfs/verify"), ("POST", "/api/validate-yaml"), ("GET", "/api/models?cursor=²&limit=²"),
]  # fmt: skip


@settings(max_examples=150)
@given(place=st.sampled_from(PLACES), body=BODIES)
def test_no_body_is_an_error_of_the_hubs_own(client: httpx2.Client, place: tuple[str, str], body: bytes) -> None:
    answer = client.request(*place, content=body)
    assert answer.status_code < 500, answer.text
    assert set(answer.headers["content-type"]) <= set(string.printable)
