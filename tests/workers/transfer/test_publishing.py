"""Publishing with the real client against the loopback Hub: once, whole, and nothing but what was verified."""

from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault
from tests.limits import TEST_SECONDS
from tests.workers.published import DAY, Faults, artifact, commits_of, publish_to, seal, tags_of
from tests.workers.transfer.test_pace import Clock
from workers.errors import CheckpointError, HubRefused, HubUnavailable
from workers.spec.job import Destination
from workers.spec.workspace import MANIFEST
from workers.transfer import from_hub, hub, to_hub
from workers.transfer.artifact import open_accepted
from workers.transfer.pace import LocalPace
from workers.transfer.patience import Patience

REPO = "acme/model-bnb-nf4"
OURS, DATED = "quantmill-ffffffffffff", "2026-11-21"


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def api(tmp_path: Path, faults: Faults) -> Iterator[Any]:
    with LoopbackHub(tmp_path / "hub", fault=faults) as server:
        yield hub.connect(server.endpoint, LocalPace())


publish, commits, tags = partial(publish_to, REPO), partial(commits_of, REPO), partial(tags_of, REPO)


def test_one_commit_then_its_tags_and_the_manifest_can_be_read(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    commit = publish(api, folder)
    assert set(api.list_repo_files(REPO)) == {*(p.name for p in folder.iterdir()), ".gitattributes"}
    assert tags(api) == {OURS: commit, DATED: commit}
    assert commits(api) == 1
    found = from_hub.read_manifest(api, REPO)
    assert found is not None
    assert (found[0].fingerprint, found[1]) == ("f" * 64, commit)
    assert api.model_info(REPO).private


def test_publishing_again_makes_no_commit_and_no_tag(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    assert publish(api, folder) == publish(api, folder, date(2026, 11, 22))
    assert commits(api) == 1
    assert set(tags(api)) == {OURS, DATED}


def test_a_new_artifact_replaces_the_old_one_whole(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "old.json").write_text("{}")
    first = publish(api, seal(folder))
    second = publish(api, artifact(tmp_path / "b", "two", "e" * 64))
    assert "old.json" not in api.list_repo_files(REPO)
    assert tags(api) == {OURS: first, DATED: first, "quantmill-eeeeeeeeeeee": second, "2026-11-21.2": second}
    assert commits(api) == 2


def test_other_bytes_of_the_same_identity_take_its_tag_over(api: Any, tmp_path: Path) -> None:
    first = publish(api, artifact(tmp_path / "a"))
    second = publish(api, artifact(tmp_path / "b", "judged again"))
    assert tags(api) == {DATED: first, OURS: second, "2026-11-21.2": second}


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_revisions_keep_their_tags(api: Any, tmp_path: Path, keep: int) -> None:
    for number in range(3):
        letter = "abc"[number]
        folder = artifact(tmp_path / letter, letter, letter * 64)
        if number == 0:
            publish(api, folder)
            api.create_tag(REPO, tag="v1")
            api.create_tag(REPO, tag="2020-01-01", revision=api.list_repo_commits(REPO)[-1].commit_id)
        publish(api, folder, date(2026, 11, 21 + number), keep=keep)
    mine = {"v1", "2020-01-01"}
    expected = {"2026-11-23", "quantmill-cccccccccccc", "2026-11-22", "quantmill-bbbbbbbbbbbb"}
    assert set(tags(api)) - mine == (expected if keep == 2 else {"2026-11-23", "quantmill-cccccccccccc"})
    assert mine <= set(tags(api)), "somebody's own tags stay"


@pytest.mark.parametrize("drop", ["before", "during", "after", "answering"])
@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/preupload/", "/lfs/objects", "/commit/main", "/tag/", "/refs"]
)
def test_a_connection_that_drops_makes_no_second_commit(
    api: Any, faults: Faults, tmp_path: Path, drop: Any, where: str
) -> None:
    faults.plan = [(where, 1, Fault(drop=drop, work=0.2))]
    commit = publish(api, artifact(tmp_path / "a"))
    assert commits(api) == 1
    assert tags(api) == {OURS: commit, DATED: commit}


@pytest.mark.parametrize("where", ["/api/repos/create", "/validate-yaml", "/tree/", "/commit/main", "/tag/", "/refs"])
def test_an_answer_that_says_not_now_is_asked_for_again(api: Any, faults: Faults, tmp_path: Path, where: str) -> None:
    busy = Fault(status=429, headers={"Retry-After": "1"})
    faults.plan = [(where, 2, Fault(status=503)), (where, 1, busy), (where, 1, Fault(status=409))]
    if where in ("/tag/", "/api/repos/create"):
        faults.plan.pop()  # for these, 409 is that it exists
    publish(api, artifact(tmp_path / "a"))
    assert commits(api) == 1


def test_a_hub_that_stays_away_is_given_up_on_in_time(api: Any, faults: Faults, tmp_path: Path) -> None:
    faults.plan = [("/api/repos/create", 99, Fault(status=503))]
    clock = Clock()
    patience = Patience(45, clock=clock, sleep=clock.sleep, jitter=lambda: 0.0)
    with pytest.raises(HubUnavailable, match=r"503; given up after 7 attempts"):
        publish(api, artifact(tmp_path / "a"), patience=patience)


def test_an_answer_that_trickles_ends_too(api: Any, faults: Faults, tmp_path: Path) -> None:
    """Every piece of it comes within the client's own deadline."""
    faults.plan = [("/commit/main", 1, Fault(trickle=0.2))]
    publish(api, artifact(tmp_path / "a"), patience=Patience(TEST_SECONDS, call_seconds=3.0, jitter=lambda: 0.0))
    assert commits(api) == 1


def test_a_head_that_moved_is_looked_at_again(api: Any, tmp_path: Path) -> None:
    """Another publisher's commit lands between our look and our commit."""
    publish(api, artifact(tmp_path / "a"))
    other = artifact(tmp_path / "b", "two", "e" * 64)
    ours = open_accepted(artifact(tmp_path / "c", "three", "d" * 64))
    publisher = to_hub._Publisher(api, REPO, ours, Destination(endpoint=api.endpoint), Patience(60, jitter=lambda: 0.0))
    change = to_hub.decide(REPO, repo := publisher.look(), publisher.content, Destination(endpoint=api.endpoint), DAY)
    publish(api, other)
    with pytest.raises(HubUnavailable, match="412"):
        publisher._act(change, repo.head)
    publisher.run(lambda: DAY)
    assert commits(api) == 3
    newest = api.list_repo_commits(REPO)[0].commit_id
    assert from_hub.read_file(api, REPO, "model.safetensors") == (b"three" * 1000, newest)


def test_a_hub_whose_answers_lag_is_waited_for(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commit it goes on showing the state before it, three times: from the second time on, we wait."""
    folder = artifact(tmp_path / "a")
    api.create_repo(REPO)
    look, stale, slept = to_hub._Publisher.look, [], list[float]()

    def lagging(self: Any) -> to_hub.Repository:
        stale.append(look(self) if not stale else stale[0])
        return stale[0] if len(stale) < 5 else look(self)

    monkeypatch.setattr(to_hub._Publisher, "look", lagging)
    publish(api, folder, patience=Patience(60, sleep=slept.append, jitter=lambda: 0.0))
    assert commits(api) == 1
    assert slept == [0.5, 1.0]


# ------------------------------------------------------------------------------- nothing but what was verified


def test_a_changed_file_stops_the_publish(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed since it was verified"):
        publish(api, folder)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", MANIFEST])
@pytest.mark.parametrize("small", [True, False])
def test_a_file_that_changes_after_the_check_stops_it_too(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: bool
) -> None:
    folder = artifact(tmp_path / "a")
    checked = open_accepted(folder)
    if not small:
        monkeypatch.setattr(to_hub, "SENT_FROM_MEMORY", 0)
    (folder / name).write_bytes(b"x" * checked.sizes[name])
    with pytest.raises(CheckpointError, match=f"{name} changed since it was verified"):
        to_hub.publish(api, REPO, checked, Destination(endpoint=api.endpoint), patience=Patience(30))
    assert api.list_repo_files(REPO) == [".gitattributes"]


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


def test_what_was_rejected_stays_here(api: Any, tmp_path: Path) -> None:
    with pytest.raises(HubRefused, match="was rejected"):
        publish(api, artifact(tmp_path / "a", accepted=False))
    assert not api.repo_exists(REPO)


def test_a_card_that_the_hub_refuses_is_found_before_the_upload(api: Any, faults: Faults, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    (folder / "README.md").write_text("---\nlicense: [[1]]\n---\n")
    with pytest.raises(HubRefused, match=r"refuses the card's metadata .*license"):
        publish(api, seal(folder))
    assert not any("preupload" in line for line in faults.seen)


# ---------------------------------------------------------------------------------- what somebody else changed


def test_somebody_elses_repository_is_left_alone(api: Any, tmp_path: Path) -> None:
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="weights.bin", repo_id=REPO)
    with pytest.raises(HubRefused, match=r"weights\.bin"):
        publish(api, artifact(tmp_path / "a"))
    assert "weights.bin" in api.list_repo_files(REPO)


def change_remotely(api: Any, change: str) -> str:
    match change:
        case "edited":
            api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\nmine", path_in_repo="README.md", repo_id=REPO)
            return "README.md"
        case "edited LFS":
            api.upload_file(path_or_fileobj=b"mine", path_in_repo="model.safetensors", repo_id=REPO)
            return "model.safetensors"
        case "added":
            api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
            return "notes.txt"
        case "removed":
            api.delete_file("config.json", repo_id=REPO)
            return "config.json"
        case _:
            api.upload_file(path_or_fileobj=b"{}", path_in_repo=MANIFEST, repo_id=REPO)
            return MANIFEST


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("change", ["edited", "edited LFS", "added", "removed", "manifest"])
@pytest.mark.parametrize("again", ["the same artifact", "a new one"])
def test_what_somebody_else_changed_is_not_overwritten_without_force(
    api: Any, tmp_path: Path, change: str, again: str, tagged: bool
) -> None:
    first = artifact(tmp_path / "a")
    publish(api, first)
    if not tagged:
        api.delete_tag(REPO, tag=OURS)
    name = change_remotely(api, change)
    before = api.list_repo_commits(REPO)[0].commit_id
    later = first if again == "the same artifact" else artifact(tmp_path / "b", "two", "e" * 64)
    with pytest.raises(HubRefused, match=rf"'{name}' on main since .* --force"):
        publish(api, later)
    assert api.list_repo_commits(REPO)[0].commit_id == before
    publish(api, later, force=True)
    assert set(api.list_repo_files(REPO)) == {*(p.name for p in later.iterdir()), ".gitattributes"}


def test_a_manifest_of_another_version_still_tells_whose_files_these_are(api: Any, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    publish(api, folder)
    api.delete_tag(REPO, tag=OURS)
    text = (folder / MANIFEST).read_text().replace('"schema_version":1', '"schema_version":7,"new":[]')
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=MANIFEST, repo_id=REPO)
    publish(api, artifact(tmp_path / "b", "two", "e" * 64))
    assert commits(api) == 3


@pytest.mark.parametrize("later", ["the same artifact", "a new one"])
def test_a_publish_that_died_before_its_tags_is_completed(api: Any, faults: Faults, tmp_path: Path, later: str) -> None:
    first = artifact(tmp_path / "a")
    faults.plan = [("/tag/", 9, Fault(status=503))]
    with pytest.raises(HubUnavailable):
        publish(api, first, patience=Patience(1.2))
    faults.plan = []
    assert (commits(api), tags(api)) == (1, {})
    folder = first if later == "the same artifact" else artifact(tmp_path / "b", "two", "e" * 64)
    commit = publish(api, folder)
    assert commits(api) == (1 if folder == first else 2)
    assert set(tags(api).values()) == {commit}


# ------------------------------------------------------------------------------------------ terms, and dry runs


@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_a_gate_stands_before_the_files_do(api: Any, faults: Faults, tmp_path: Path, gated: Any) -> None:
    publish(api, artifact(tmp_path / "a"), gated=gated, private=False)
    assert api.model_info(REPO).gated == gated
    assert not api.model_info(REPO).private
    order = [line.rsplit("/", 1)[-1] for line in faults.seen if line.endswith(("/settings", "/commit/main"))]
    assert order == ["settings", "main"]
    publish(api, artifact(tmp_path / "a"))
    assert api.model_info(REPO).gated == gated, "left alone where the zoo asks for none"


def test_a_look_writes_nothing(api: Any, faults: Faults, tmp_path: Path) -> None:
    to = Destination(endpoint=api.endpoint, keep=1)
    change = to_hub.preview(api, REPO, open_accepted(artifact(tmp_path / "a")), to, DAY)
    assert change.create
    assert not api.repo_exists(REPO)
    publish(api, artifact(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "more.txt").write_text("more")
    before = len(faults.seen)
    later = open_accepted(artifact(tmp_path / "b", "two", "e" * 64))
    change = to_hub.preview(api, REPO, later, to, DAY)
    assert set(change.add) == {"README.md", MANIFEST, "model.safetensors", "more.txt"}
    assert change.tags == ("2026-11-21.2", "quantmill-eeeeeeeeeeee")
    assert set(change.stale_tags) == {OURS, DATED}
    assert {line.split()[0] for line in faults.seen[before:]} == {"GET"}
