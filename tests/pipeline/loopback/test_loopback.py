"""The loopback Hub, driven by the real huggingface_hub client and by transformers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from pipeline.loopback import Fault, FaultRequest, Limits, LoopbackHub
from tests.limits import SOON_SECONDS
from tests.pipeline.runs import wait_for

# huggingface_hub 2.4 itself uploads LFS files with the argument that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "team/model"
WEIGHTS = random.Random(0).randbytes(300_000)
CONFIG = b'{"model_type": "llama"}\n'
CARD = "---\nlicense: apache-2.0\ntags: [quantized]\nbase_model: team/base\n---\n# A model <b>\n"
ANY = "hf_anything"

Faults = list[Callable[[FaultRequest], Fault | None]]


@pytest.fixture
def faults() -> Faults:
    """Put a function here to make the hub of the same test misbehave."""
    return []


@pytest.fixture
def hub(tmp_path: Path, faults: Faults) -> Iterator[LoopbackHub]:
    def fault(request: FaultRequest) -> Fault | None:
        return faults[0](request) if faults else None

    with LoopbackHub(tmp_path / "hub", fault=fault) as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=ANY)
    api.create_repo(REPO)
    return api


def publish(api: HfApi, *, parent: str | None = None, **files: bytes) -> CommitInfo:
    """One commit; in the names of files, __ stands for a dot."""
    named = files or {"model__safetensors": WEIGHTS, "config__json": CONFIG, "README__md": CARD.encode()}
    operations = [CommitOperationAdd(name.replace("__", "."), data) for name, data in named.items()]
    api.preupload_lfs_files(REPO, operations)
    return api.create_commit(REPO, operations, commit_message="publish", parent_commit=parent)


def head(api: HfApi) -> str:
    sha = api.repo_info(REPO).sha
    assert sha is not None
    return sha


def download(api: HfApi, cache: Path, name: str, revision: str | None = None) -> bytes:
    path = hf_hub_download(REPO, name, revision=revision, cache_dir=cache, endpoint=api.endpoint, token=api.token)
    return Path(path).read_bytes()


# Publishing and loading


def test_created_repository_exists_once(api: HfApi) -> None:
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_published_bytes_come_back_by_tag_and_by_commit(api: HfApi, tmp_path: Path) -> None:
    first = publish(api)
    api.create_tag(REPO, tag="v1", revision=first.oid)
    api.create_tag(REPO, tag="v1", revision=first.oid, exist_ok=True)
    second = publish(api, model__safetensors=WEIGHTS[::-1])

    assert download(api, tmp_path, "model.safetensors", "v1") == WEIGHTS
    assert download(api, tmp_path, "model.safetensors", first.oid) == WEIGHTS
    assert download(api, tmp_path, "model.safetensors") == WEIGHTS[::-1]
    assert download(api, tmp_path, "config.json", second.oid) == CONFIG
    folder = snapshot_download(REPO, revision="v1", cache_dir=tmp_path / "s", endpoint=api.endpoint)
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert [c.commit_id for c in api.list_repo_commits(REPO)][:2] == [second.oid, first.oid]


def test_repo_info_tells_sizes_and_hashes_as_git_does(api: HfApi) -> None:
    publish(api)
    info = api.model_info(REPO, files_metadata=True)
    files = {f.rfilename: f for f in info.siblings or []}
    lfs = files["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs.sha256}\nsize {lfs.size}\n".encode()
    for name, data in {"config.json": CONFIG, "model.safetensors": pointer}.items():
        git = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True)
        assert files[name].blob_id == git.stdout.decode().strip()
    assert lfs.pointer_size == len(pointer)
    assert info.tags == ["quantized"]
    assert info.card_data is not None
    assert info.card_data["base_model"] == "team/base"
    assert api.model_info(REPO, expand=["sha"]).siblings is None


def test_tree_and_paths_info(api: HfApi) -> None:
    operations = [CommitOperationAdd(f"sub/deep/{n}.json", b"{}") for n in range(2)]
    api.create_commit(REPO, operations, commit_message="nested")
    assert [f.path for f in api.list_repo_tree(REPO)] == [".gitattributes", "sub"]
    assert [f.path for f in api.list_repo_tree(REPO, "sub/deep")] == ["sub/deep/0.json", "sub/deep/1.json"]
    found = api.get_paths_info(REPO, ["sub/deep/0.json", "sub", "nothing"])
    assert sorted(f.path for f in found) == ["sub", "sub/deep/0.json"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing"))


def test_long_listing_comes_in_pages(api: HfApi) -> None:
    names = {f"f{n:04}.txt" for n in range(1100)}
    api.create_commit(REPO, [CommitOperationAdd(name, b"x") for name in names], commit_message="many")
    assert set(api.list_repo_files(REPO)) == names | {".gitattributes"}


def test_unchanged_files_make_no_commit(api: HfApi) -> None:
    oid = publish(api).oid
    assert publish(api).oid == oid
    # The client drops unchanged files itself; a repeat of a lost request comes with them.
    line = {"key": "file", "value": {"path": "config.json", "encoding": "base64", "content": "eyJtb2RlbF90eXBlIjogImxsYW1hIn0K"}}  # fmt: skip  # noqa: E501
    body = "\n".join(json.dumps(part) for part in ({"key": "header", "value": {"summary": "again"}}, line))
    answer = httpx2.post(f"{api.endpoint}/api/models/{REPO}/commit/main", content=body)
    assert answer.json()["commitOid"] == oid
    assert len(api.list_repo_commits(REPO)) == 2


def test_deletion_of_files_and_folders(api: HfApi) -> None:
    publish(api)
    api.create_commit(REPO, [CommitOperationAdd("sub/a.txt", b"a")], commit_message="sub")
    deletions = [CommitOperationDelete("config.json"), CommitOperationDelete("sub/")]
    api.create_commit(REPO, deletions, commit_message="delete")
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "model.safetensors"]
    with pytest.raises(EntryNotFoundError, match="is_folder"):
        api.delete_file("config.json", REPO)


def test_branches_and_tags(api: HfApi) -> None:
    first = head(api)
    oid = publish(api).oid
    api.create_branch(REPO, branch="refs-like/dev", revision=first)
    api.create_tag(REPO, tag="quant/v1.0", tag_message="two words")
    refs = api.list_repo_refs(REPO)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": oid, "refs-like/dev": first}
    assert {t.ref: t.target_commit for t in refs.tags} == {"refs/tags/quant/v1.0": oid}
    assert api.repo_info(REPO, revision="refs-like/dev").sha == first
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="refs-like/dev")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="quant/v1.0")
    api.delete_tag(REPO, tag="quant/v1.0")
    api.delete_branch(REPO, branch="refs-like/dev")
    assert not api.revision_exists(REPO, "quant/v1.0")
    assert not api.revision_exists(REPO, "refs-like/dev")


def test_unknown_things_raise_their_own_exceptions(api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("team/none")
    with pytest.raises(RepositoryNotFoundError):
        api.create_commit("team/none", [CommitOperationAdd("a", b"a")], commit_message="x")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="none")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="x", revision="none")
    with pytest.raises(RevisionNotFoundError):
        download(api, tmp_path, "config.json", "none")
    with pytest.raises(EntryNotFoundError):
        download(api, tmp_path, "none.json")
    assert not api.repo_exists("gpt2")


def test_settings_move_delete_and_listing(api: HfApi) -> None:
    api.create_repo("other/thing", private=True)
    stranger = HfApi(endpoint=api.endpoint, token=False)
    assert [m.id for m in stranger.list_models()] == ["other/thing", REPO]
    assert [m.sha for m in api.list_models(search="model", expand=["sha"])] == [head(api)]
    assert [m.id for m in api.list_models(author="team", search="MOD")] == [REPO]
    assert api.repo_info("other/thing").private
    api.update_repo_settings("other/thing", private=False)
    assert not api.repo_info("other/thing").private
    api.move_repo("other/thing", "team/moved")
    assert not api.repo_exists("other/thing")
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.move_repo("team/moved", REPO)
    api.delete_repo("team/moved")
    api.delete_repo("team/moved", missing_ok=True)
    assert [m.id for m in api.list_models(limit=5)] == [REPO]
    assert [org["name"] for org in api.whoami()["orgs"]] == ["team"]


def test_collections(api: HfApi) -> None:
    collection = api.create_collection("Quantized nightly", namespace="team", description="all")
    assert api.create_collection("Quantized nightly", namespace="team", exists_ok=True).slug == collection.slug
    api.add_collection_item(collection.slug, REPO, "model", note="int4")
    api.add_collection_item(collection.slug, REPO, "model", exists_ok=True)
    items = api.get_collection(collection.slug).items
    assert [(i.item_id, i.note) for i in items] == [(REPO, "int4")]
    with pytest.raises(HfHubHTTPError):
        api.get_collection("team/none-0123")
    assert [entry.slug for entry in api.list_collections(owner="team")] == [collection.slug]
    assert list(api.list_collections(owner="other")) == []
    assert list(api.list_collections(owner="../team")) == []


def test_gates(api: HfApi) -> None:
    assert api.model_info(REPO, expand=["gated"]).gated is False
    api.update_repo_settings(REPO, gated="manual")
    api.update_repo_settings(REPO, private=True)
    assert (api.model_info(REPO).gated, api.model_info(REPO).private) == ("manual", True)
    api.update_repo_settings(REPO, gated=False)
    assert (api.model_info(REPO).gated, api.model_info(REPO).private) == (False, True)
    answer = httpx2.put(f"{api.endpoint}/api/models/{REPO}/settings", json={"gated": "maybe"})
    assert answer.status_code == 400


# Uploads


@pytest.mark.parametrize("size", [999, 1000, 1001, 1200, 10_001])
def test_multipart_upload(tmp_path: Path, size: int) -> None:
    seen: list[str] = []

    def record(request: FaultRequest) -> None:
        seen.append(f"{request.method} {request.path.split('/')[2]}")

    limits = Limits(multipart_above=1000, part_bytes=400)
    with LoopbackHub(tmp_path / "hub", fault=record, limits=limits) as hub:
        api = HfApi(endpoint=hub.endpoint, token=ANY)
        api.create_repo(REPO)
        publish(api, model__safetensors=WEIGHTS[:size])
        assert download(api, tmp_path / "cache", "model.safetensors") == WEIGHTS[:size]
    parts = -(-size // 400) if size > 1000 else 0
    assert seen.count("PUT parts") == parts
    assert seen.count("PUT objects") == (parts == 0)
    assert not list((tmp_path / "hub" / "incoming").iterdir())


def test_commit_of_an_object_that_was_never_uploaded_is_refused(api: HfApi) -> None:
    before = head(api)
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation._upload_mode, operation._is_uploaded, operation._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="never uploaded"):
        api.create_commit(REPO, [operation], commit_message="pointer to nothing")
    assert head(api) == before


def test_range_and_resumed_download(api: HfApi, tmp_path: Path) -> None:
    publish(api)
    url = f"{api.endpoint}/{REPO}/resolve/main/model.safetensors"
    answer = httpx2.get(url, headers={"Range": "bytes=100-199"})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[100:200])
    partial = tmp_path / "partial"
    partial.write_bytes(WEIGHTS[:1000])
    with partial.open("ab") as file:
        http_get(url, file, resume_size=1000, expected_size=len(WEIGHTS), headers={})
    assert partial.read_bytes() == WEIGHTS


# Who may do what


def test_private_repository_needs_the_token(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub", token="hf_right") as hub:
        owner, stranger = (HfApi(endpoint=hub.endpoint, token=token) for token in ("hf_right", False))
        owner.create_repo(REPO, private=True)
        publish(owner)
        assert download(owner, tmp_path, "config.json") == CONFIG
        with pytest.raises(RepositoryNotFoundError):
            stranger.repo_info(REPO)
        with pytest.raises(RepositoryNotFoundError):
            download(stranger, tmp_path / "none", "config.json")
        assert not list(stranger.list_models())
        assert httpx2.get(f"{hub.endpoint}/{REPO}").status_code == 401
        owner.update_repo_settings(REPO, private=False)
        assert download(stranger, tmp_path / "public", "config.json") == CONFIG
        with pytest.raises(RepositoryNotFoundError):
            publish(stranger, config__json=b"{}")
        with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
            stranger.create_repo("team/second")


def test_wrong_token_is_told_apart_from_a_missing_repository(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub", token="hf_right") as hub:
        HfApi(endpoint=hub.endpoint, token="hf_right").create_repo(REPO)
        wrong = HfApi(endpoint=hub.endpoint, token="hf_wrong")
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            wrong.whoami()
        for work in (lambda: wrong.repo_info(REPO), lambda: publish(wrong)):
            with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
                work()
            assert not isinstance(caught.value, RepositoryNotFoundError)


# Losses and races


def test_moved_parent_is_refused(api: HfApi) -> None:
    parent = head(api)
    publish(api, parent=parent)
    with pytest.raises(HfHubHTTPError) as caught:
        publish(api, parent=parent, config__json=b"{}")
    assert caught.value.response.status_code == 412


def test_simultaneous_commits_lose_nothing(api: HfApi) -> None:
    start = threading.Barrier(8)

    def one(n: int, parent: str | None) -> bool:
        start.wait()
        try:
            publish(api, parent=parent, **{f"{n}-{parent}__txt": b"x"})
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8), [None] * 8))
        assert len(api.list_repo_commits(REPO)) == 9
        assert len(api.list_repo_files(REPO)) == 9
        assert sum(pool.map(one, range(8), [head(api)] * 8)) == 1


def is_commit(request: FaultRequest) -> bool:
    return request.method == "POST" and "/commit/" in request.path


def test_commit_with_a_lost_answer_has_landed(api: HfApi, faults: Faults) -> None:
    parent = head(api)
    faults.append(lambda request: Fault(drop="after") if is_commit(request) else None)
    with pytest.raises(httpx2.TransportError):
        publish(api, parent=parent)
    faults.clear()
    landed = head(api)
    assert landed != parent
    assert publish(api).oid == landed


@pytest.mark.parametrize("fault", [Fault(drop="before"), Fault(status=503, headers={"Retry-After": "1"})])
def test_refused_commit_has_not_landed(api: HfApi, faults: Faults, fault: Fault) -> None:
    before = head(api)
    faults.append(lambda request: fault if is_commit(request) else None)
    with pytest.raises((httpx2.TransportError, HfHubHTTPError)):
        publish(api)
    assert head(api) == before


def test_client_waits_as_long_as_a_fault_says(api: HfApi, faults: Faults) -> None:
    answers = [Fault(status=429, headers={"Retry-After": "1"}), Fault(delay=0.3)]
    faults.append(lambda r: answers.pop(0) if "/preupload/" in r.path and answers else None)
    begin = time.monotonic()
    publish(api)
    assert not answers
    assert time.monotonic() - begin > 1.3


def test_a_fault_answers_or_drops() -> None:
    with pytest.raises(ValueError, match="not both"):
        Fault(status=503, drop="after")


# People and libraries


UNTRUSTED = """
# Heading

| a | b |
|---|---|
| one | two |

![its chart](chart.png) ![a badge](https://img.shields.io/x) [files](./config.json) [bad](javascript:alert(2))

<details><summary>again.yaml</summary>

folded

</details>

<script>alert(1)</script>

and <img src=x onerror=alert(3)> within
"""


def test_pages_show_a_repository_and_run_nothing_of_it(api: HfApi) -> None:
    card = CARD + UNTRUSTED
    oid = publish(api, README__md=card.encode(), model__safetensors=WEIGHTS).oid
    api.create_tag(REPO, tag="v1")
    assert f'href="/{REPO}"' in httpx2.get(f"{api.endpoint}/").text
    for path in (REPO, f"{REPO}/tree/v1", f"{REPO}/commit/{oid}"):
        text = httpx2.get(f"{api.endpoint}/{path}").text
        assert "&lt;script&gt;alert(1)" in text
        assert "<script" not in text
        assert "<img src=x" not in text
        assert 'href="javascript' not in text
        assert "<h1>Heading</h1>" in text
        assert "<td>two</td>" in text
        assert f'<img src="/{REPO}/resolve/{oid}/chart.png" alt="its chart" />' in text
        assert "<code>a badge</code>" in text, "nothing is loaded from elsewhere"
        assert f'href="/{REPO}/resolve/{oid}/config.json"' in text
        assert "<details><summary>again.yaml</summary>" in text
        assert text.index("<h1>Heading") < text.index("<h2>Files"), "the card comes first"
        assert all(word in text for word in ("model.safetensors", "300,000", oid[:12], ">v1<", "publish"))


def test_a_bad_card_is_refused(api: HfApi) -> None:
    with pytest.raises(ValueError, match="license"):
        publish(api, README__md=b"---\nlicense: 3\n---\n")
    with pytest.raises(ValueError, match="YAML"):
        publish(api, README__md=b"---\na: [\n---\n")
    with pytest.warns(UserWarning, match="empty or missing"):
        publish(api, README__md=b"# no metadata\n")


LOAD = """
import sys
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer
repo = sys.argv[1]
config = AutoConfig.from_pretrained(repo, revision="v1")
tokenizer = AutoTokenizer.from_pretrained(repo, revision="v1")
card = ModelCard.load(repo)
card.validate()
print(config.model_type, config.hidden_size, tokenizer("b a")["input_ids"], card.data.license)
"""


@pytest.mark.slow
def test_transformers_loads_from_it(api: HfApi, tmp_path: Path) -> None:
    tokenizer: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    }  # fmt: skip
    publish(
        api,
        config__json=b'{"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4}',
        tokenizer__json=json.dumps(tokenizer).encode(),
        tokenizer_config__json=b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        README__md=CARD.encode(),
    )
    api.create_tag(REPO, tag="v1")
    environment = {"HF_ENDPOINT": api.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, REPO]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "llama 48 [1, 0] apache-2.0"


# Faults of the connection


@pytest.mark.parametrize("drop", ["before", "during", "after", "answering"])
def test_a_drop_does_the_work_unless_it_comes_before(tmp_path: Path, drop: Any) -> None:
    work = 3.0 if drop == "during" else 0.0

    def fault(request: FaultRequest) -> Fault | None:
        return Fault(drop=drop, work=work) if request.path.endswith("create") else None

    with LoopbackHub(tmp_path / "hub", fault=fault) as hub:
        api = HfApi(endpoint=hub.endpoint, token=ANY)
        with pytest.raises(httpx2.TransportError):
            api.create_repo(REPO)
        if drop == "during":
            assert not api.repo_exists(REPO), "the client is back before the work is done"
            assert wait_for(lambda: api.repo_exists(REPO), SOON_SECONDS)
        assert api.repo_exists(REPO) is (drop != "before")


def test_a_slow_link_brings_the_same_bytes_later(tmp_path: Path) -> None:
    slow = Fault(trickle=0.01)
    with LoopbackHub(tmp_path / "hub", fault=lambda request: slow if "resolve" in request.path else None) as hub:
        api = HfApi(endpoint=hub.endpoint, token=ANY)
        api.create_repo(REPO)
        publish(api)
        begun = time.monotonic()
        assert httpx2.get(f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors").content == WEIGHTS
        assert time.monotonic() - begun > 0.4
