"""A gathered repository on the loopback Hub: one commit for each artifact, and nothing of the others is lost."""

import json
import threading
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault
from tests.workers.published import Faults, artifact, commits_of, publish_to, seal, tags_of
from workers.errors import HubRefused, HubUnavailable
from workers.machine.files import file_sha256
from workers.spec.job import Metrics
from workers.spec.workspace import MANIFEST
from workers.transfer import from_hub, gathered, hub, to_hub
from workers.transfer.artifact import open_accepted, published_files
from workers.transfer.pace import LocalPace
from workers.transfer.patience import Patience

REPO = "acme/model-GGUF"


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def api(tmp_path: Path, faults: Faults) -> Iterator[Any]:
    with LoopbackHub(tmp_path / "hub", fault=faults) as server:
        yield hub.connect(server.endpoint, LocalPace())


def gguf(
    folder: Path, mix: str = "q4_0", text: str = "one", fingerprint: str = "", model: str = "org/model", kl: float = 0.1
) -> Path:
    """A GGUF artifact with the files that one has."""
    folder.mkdir(parents=True, exist_ok=True)
    file = f"model-{mix.upper()}.gguf"
    described = {"quantization_config": {"quant_method": "gguf", "file": file, "file_type": mix}}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {model}\n---\n{mix}")
    (folder / file).write_bytes(f"{mix} {text}".encode() * 1000)
    (folder / "tokenizer.json").write_text("{}")
    metrics = Metrics(
        perplexity=2.0, reference_perplexity=2.0, kl_mean=kl, kl_mean_upper=kl, kl_p99=kl, top1_agreement=0.9,
        top1_agreement_lower=0.9, perplexity_ratio_upper=1.0, eval_tokens=1000,
    )  # fmt: skip
    identity = fingerprint or (mix.replace("_", "") * 64).encode().hex()[:64]
    return seal(folder, identity, model=model, name=f"gguf-{mix}", metrics=metrics)


publish, commits, tags = partial(publish_to, REPO, gather=True), partial(commits_of, REPO), partial(tags_of, REPO)


def files(api: Any) -> dict[str, str]:
    tree = api.list_repo_tree(REPO, recursive=True)
    return {entry.path: entry.blob_id for entry in tree if hasattr(entry, "blob_id")}


def check_whole(api: Any, folders: list[Path]) -> gathered.Index:
    """Main shows exactly these artifacts, its index is right about every file, and each is found as published."""
    names = set(files(api)) - {".gitattributes"}
    text = from_hub.read_file(api, REPO, MANIFEST)
    assert text is not None
    index = gathered.read_index(text[0])
    assert index is not None
    assert set(index.files) == names - {MANIFEST}
    contents = published_files(text[0])
    assert contents is not None
    assert contents.fingerprint == index.fingerprint
    for path, entry in index.files.items():
        local = api.hf_hub_download(REPO, path)
        assert file_sha256(Path(local)) == entry.sha256, path
    card = from_hub.read_file(api, REPO, "README.md")
    assert card is not None
    for folder in folders:
        manifest = open_accepted(folder).manifest
        standing = to_hub.standing(api.endpoint, REPO, manifest.fingerprint)
        assert standing is not None
        assert standing[0] == manifest
        kind = manifest.recipe.name.removeprefix("gguf-").upper()
        assert f"model-{kind}.gguf" in card[0].decode()
    assert {member.recipe for member in index.members} == {open_accepted(f).manifest.recipe.name for f in folders}
    return index


def test_a_recipe_adds_its_file_and_leaves_the_others(api: Any, tmp_path: Path) -> None:
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0", kl=0.001)
    publish(api, first)
    before = files(api)
    assert set(before) == {
        ".gitattributes", "README.md", MANIFEST, "model-Q4_0.gguf", "tokenizer.json", "quantmill/gguf-q4_0/README.md",
        "quantmill/gguf-q4_0/config.json", f"quantmill/gguf-q4_0/{MANIFEST}",
    }  # fmt: skip
    commit = publish(api, second, date(2026, 11, 22))
    after = files(api)
    assert {path for path in before if after.get(path) != before[path]} == {"README.md", MANIFEST}
    index = check_whole(api, [first, second])
    assert commits(api) == 2
    assert tags(api)[f"quantmill-{index.fingerprint[:12]}"] == tags(api)["2026-11-22"] == commit
    card = from_hub.read_file(api, REPO, "README.md")
    assert card is not None
    lines = card[0].decode().splitlines()
    table = [line for line in lines if line.startswith("| [model")]
    assert [line.split("(")[0] for line in table] == ["| [model-Q4_0.gguf]", "| [model-Q8_0.gguf]"]
    assert "rather Q8_0: no larger, and nearer" in table[0]
    assert "nearest to the original; smallest within" in table[1]


def test_a_projector_is_published_once_for_all_files(api: Any, tmp_path: Path) -> None:
    projector = "mmproj-model-F16.gguf"
    folders = []
    for name, mix in (("a", "q4_0"), ("b", "q8_0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / projector).write_bytes(b"towers" * 1000)
        folders.append(gguf(tmp_path / name, mix))
    publish(api, folders[0])
    before = files(api)
    publish(api, folders[1])
    index = check_whole(api, folders)
    assert files(api)[projector] == before[projector]
    assert {member.file for member in index.members} == {"model-Q4_0.gguf", "model-Q8_0.gguf"}, "no file to choose"
    card = from_hub.read_file(api, REPO, "README.md")
    assert card is not None
    assert f"`{projector}` has the towers and the projector" in card[0].decode()
    again = gguf(tmp_path / "c", "q6_k")  # without one: made where the converter had none
    publish(api, again)
    check_whole(api, [*folders, again])
    assert files(api)[projector] == before[projector], "the others still need it"


def test_the_second_night_commits_nothing(api: Any, faults: Faults, tmp_path: Path) -> None:
    both = [gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")]
    for folder in both:
        publish(api, folder)
    before = tags(api)
    faults.seen.clear()
    for folder in both:
        publish(api, folder, date(2026, 11, 22))
    assert commits(api) == 2
    assert tags(api) == before
    assert {line.split()[0] for line in faults.seen} == {"GET"}


def test_a_new_version_replaces_its_own_file_alone(api: Any, tmp_path: Path) -> None:
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")
    for folder in (first, second):
        publish(api, folder)
    before = files(api)
    again = gguf(tmp_path / "c", "q4_0", "two", "d" * 64)
    publish(api, again)
    after = files(api)
    assert after["model-Q4_0.gguf"] != before["model-Q4_0.gguf"]
    assert after["model-Q8_0.gguf"] == before["model-Q8_0.gguf"]
    check_whole(api, [again, second])
    assert to_hub.standing(api.endpoint, REPO, open_accepted(first).manifest.fingerprint) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_artifacts_stand_whatever_revisions_are_kept(api: Any, tmp_path: Path, keep: int) -> None:
    folders = [gguf(tmp_path / mix, mix) for mix in ("q4_0", "q8_0", "q6_k")]
    for number, folder in enumerate(folders):
        publish(api, folder, date(2026, 11, 21 + number), keep=keep)
    check_whole(api, folders)
    assert len(set(tags(api).values())) == keep


@pytest.mark.parametrize("drop", ["before", "during", "after", "answering"])
@pytest.mark.parametrize("where", ["/preupload/", "/lfs/objects", "/commit/main", "/tag/", "/refs"])
def test_a_connection_that_drops_makes_no_second_commit(
    api: Any, faults: Faults, tmp_path: Path, drop: Any, where: str
) -> None:
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")
    publish(api, first)
    faults.plan = [(where, 1, Fault(drop=drop, work=0.2))]
    publish(api, second)
    assert commits(api) == 2
    check_whole(api, [first, second])


def test_publishers_at_the_same_time_lose_nothing(api: Any, tmp_path: Path) -> None:
    mixes = ("q4_0", "q8_0", "q6_k", "q5_0", "q2_k")
    folders = [gguf(tmp_path / mix, mix) for mix in mixes]
    errors: list[BaseException] = []
    start = threading.Barrier(len(folders))

    def one(folder: Path) -> None:
        start.wait()
        try:
            publish(hub.connect(api.endpoint, LocalPace()), folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert commits(api) == len(folders)
    index = check_whole(api, folders)
    assert tags(api)[f"quantmill-{index.fingerprint[:12]}"] == api.list_repo_commits(REPO)[0].commit_id


def test_a_publish_that_died_before_its_tags_leaves_the_others_standing(
    api: Any, faults: Faults, tmp_path: Path
) -> None:
    first, second, third = (gguf(tmp_path / mix, mix) for mix in ("q4_0", "q8_0", "q6_k"))
    publish(api, first)
    faults.plan = [("/tag/", 99, Fault(status=503))]
    with pytest.raises(HubUnavailable):
        publish(api, second, patience=Patience(1.2))
    faults.plan = []
    prints = [open_accepted(folder).manifest.fingerprint for folder in (first, second)]
    assert [to_hub.standing(api.endpoint, REPO, each) is not None for each in prints] == [True, False]
    publish(api, third)
    assert commits(api) == 3
    check_whole(api, [first, second, third])


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("path", ["model-Q4_0.gguf", "README.md", "notes.txt", "quantmill/gguf-q4_0/README.md"])
def test_what_somebody_else_changed_is_not_overwritten_without_force(
    api: Any, tmp_path: Path, path: str, tagged: bool
) -> None:
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")
    publish(api, first)
    if not tagged:
        for tag in tags(api):
            api.delete_tag(REPO, tag=tag)
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\nmine", path_in_repo=path, repo_id=REPO)
    for folder in (first, second):
        with pytest.raises(HubRefused, match=rf"'{path}' on main since .* --force"):
            publish(api, folder)
    publish(api, first, force=True)
    check_whole(api, [first])
    publish(api, second)
    check_whole(api, [first, second])


def test_a_file_of_another_that_somebody_changed_is_made_again_after_force(api: Any, tmp_path: Path) -> None:
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")
    publish(api, first)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="model-Q4_0.gguf", repo_id=REPO)
    publish(api, second, force=True)
    check_whole(api, [second])
    publish(api, first)
    check_whole(api, [first, second])


def test_a_repository_of_one_artifact_is_not_made_a_gathered_one(api: Any, tmp_path: Path) -> None:
    one = gguf(tmp_path / "a")
    publish(api, one, gather=False)
    assert "quantmill.json" in files(api)
    assert "config.json" in files(api)
    with pytest.raises(HubRefused, match="holds one artifact alone"):
        publish(api, gguf(tmp_path / "b", "q8_0"))
    publish(api, one, force=True)
    check_whole(api, [one])


def test_a_gathered_repository_stays_one(api: Any, tmp_path: Path) -> None:
    """Whoever publishes into it, as by `quantmill publish`, adds a file or is refused."""
    first, second = gguf(tmp_path / "a"), gguf(tmp_path / "b", "q8_0")
    publish(api, first)
    publish(api, second, gather=False)
    check_whole(api, [first, second])
    with pytest.raises(HubRefused, match=r"only gguf can share a repository"):
        publish(api, artifact(tmp_path / "c"), gather=False)
    check_whole(api, [first, second])


def test_files_of_another_model_are_refused(api: Any, tmp_path: Path) -> None:
    publish(api, gguf(tmp_path / "a"))
    with pytest.raises(HubRefused, match=r"holds files of 'org/model', and this is one of 'org/other'"):
        publish(api, gguf(tmp_path / "b", "q8_0", model="org/other"))
    assert "model-Q8_0.gguf" not in files(api)
