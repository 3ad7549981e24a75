"""Publishing with the real client against the loopback Hub: once, whole, and nothing but what was verified."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault, FaultRequest
from pipeline.shipped import recipe
from workers import hub
from workers.content import file_sha256
from workers.errors import CheckpointError, HubRefused, HubUnavailable
from workers.job import MANIFEST, Dataset, FileEntry, Manifest, Thresholds, Verdict, Verification

REPO = "acme/model-bnb-nf4"


def artifact(folder: Path, text: str = "one", fingerprint: str = "f" * 64) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{text}")
    (folder / "model.safetensors").write_bytes(text.encode() * 1000)
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    manifest = Manifest(
        fingerprint=fingerprint,
        model="org/model",
        revision="r",
        recipe=recipe("bnb-nf4"),
        calibration=None,
        verification=Verification(dataset=Dataset(path="text")),
        thresholds=Thresholds(kl_mean=1, top1_agreement=0.5, perplexity_ratio=2, runtime_logit_difference=1),
        files={path.name: FileEntry(sha256=file_sha256(path), size=path.stat().st_size) for path in files},
        verdict=Verdict(accepted=True, reasons=()),
        environment={},
        fallbacks=(),
        bytes=1,
        reference_bytes=2,
        created_at="now",
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


class Faults:
    """Fails the first so many requests whose path contains some text."""

    def __init__(self) -> None:
        self.plan: list[tuple[str, int, Fault]] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, request: FaultRequest) -> Fault | None:
        with self._lock:
            self.seen.append(f"{request.method} {request.path}")
            for index, (part, left, fault) in enumerate(self.plan):
                if part in request.path and left:
                    self.plan[index] = (part, left - 1, fault)
                    return fault
        return None


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def api(tmp_path: Path, faults: Faults) -> Iterator[Any]:
    with LoopbackHub(tmp_path / "hub", fault=faults) as server:
        yield hub.connect(server.endpoint)


def publish(api: Any, folder: Path) -> str:
    return hub.publish(api, REPO, folder, private=True, message="m")


def commits(api: Any) -> int:
    return len(api.list_repo_commits(REPO))


def test_one_commit_then_a_tag_and_the_manifest_can_be_read(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    commit = publish(api, folder)
    assert set(api.list_repo_files(REPO)) == {*(p.name for p in folder.iterdir()), ".gitattributes"}
    assert {tag.name: tag.target_commit for tag in api.list_repo_refs(REPO).tags} == {"quantmill-ffffffffffff": commit}
    assert commits(api) == 2  # the Hub's own first one, and ours
    found = hub.read_manifest(api, REPO)
    assert found is not None
    assert found[0].fingerprint == "f" * 64
    assert found[1] == commit
    assert api.model_info(REPO).private


def test_publishing_again_makes_no_commit(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    assert publish(api, folder) == publish(api, folder)
    assert commits(api) == 2


def test_a_new_artifact_replaces_the_old_one_whole(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "old.json").write_text("{}")
    artifact(folder)
    publish(api, folder)
    publish(api, artifact(tmp_path / "b", "two", "e" * 64))
    assert "old.json" not in api.list_repo_files(REPO)
    assert {tag.name for tag in api.list_repo_refs(REPO).tags} == {"quantmill-ffffffffffff", "quantmill-eeeeeeeeeeee"}
    assert commits(api) == 3


@pytest.mark.parametrize("drop", ["before", "after"])
def test_a_lost_answer_is_no_second_commit(api: Any, faults: Faults, tmp_path: Path, drop: Any) -> None:
    faults.plan = [("/commit/main", 1, Fault(drop=drop))]
    folder = artifact(tmp_path / "a")
    if drop == "before":
        with pytest.raises(HubUnavailable):
            publish(api, folder)
    publish(api, folder)
    assert commits(api) == 2


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/main", "/tag/", "/refs"])
def test_what_the_client_raises_on_is_worth_trying_again(api: Any, faults: Faults, tmp_path: Path, where: str) -> None:
    faults.plan = [(where, 1, Fault(status=503))]
    folder = artifact(tmp_path / "a")
    with pytest.raises(HubUnavailable, match="503"):
        publish(api, folder)
    publish(api, folder)
    assert commits(api) == 2


def test_a_hub_that_asks_to_wait_is_quoted(api: Any, faults: Faults, tmp_path: Path) -> None:
    faults.plan = [("/api/repos/create", 1, Fault(status=429, headers={"Retry-After": "7"}))]
    with pytest.raises(HubUnavailable) as caught:
        publish(api, artifact(tmp_path / "a"))
    assert caught.value.retry_after == 7


def test_a_changed_file_stops_the_publish(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed since it was verified"):
        publish(api, folder)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize("change", ["added", "removed", "unverified"])
def test_files_must_be_those_of_the_manifest(api: Any, tmp_path: Path, change: str) -> None:
    folder = artifact(tmp_path / "a")
    if change == "added":
        (folder / "extra.txt").write_text("x")
    else:
        (folder / ("config.json" if change == "removed" else MANIFEST)).unlink()
    with pytest.raises(CheckpointError):
        publish(api, folder)
    assert not api.repo_exists(REPO)


def test_somebody_elses_repository_is_left_alone(api: Any, tmp_path: Path) -> None:
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="weights.bin", repo_id=REPO)
    with pytest.raises(HubRefused, match=r"weights\.bin"):
        publish(api, artifact(tmp_path / "a"))
    assert "weights.bin" in api.list_repo_files(REPO)


def test_no_call_waits_for_ever(api: Any, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CALL_DEADLINE_SECONDS", 0.5)
    faults.plan = [("/commit/main", 1, Fault(delay=5.0))]
    hub._set_deadlines.cache_clear()
    stalled = hub.connect(api.endpoint)
    with pytest.raises(HubUnavailable, match="Timeout"):
        hub.publish(stalled, REPO, artifact(tmp_path / "a"), private=True, message="m")
    hub._set_deadlines.cache_clear()


def test_what_is_not_there_is_none(api: Any) -> None:
    assert hub.read_manifest(api, "acme/nothing") is None
