"""Shared storage: what one node made, another takes up; torn and foreign copies count as absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.jobs import ZOO, job
from workers.errors import DiskFull, HubRefused, HubUnavailable, ZooError
from workers.machine.files import folder_sha256
from workers.run import run_stage
from workers.spec.job import Destination, Job, Stage
from workers.spec.workspace import MANIFEST, artifact_folder, folds_folder, record_path
from workers.transfer.storage import KEPT, Storage

LLAMA = ZOO / "models" / "llama-tiny"


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "path":
        yield str(tmp_path / "storage")
        return
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield "memory://storage"
    MemoryFileSystem.store.clear()


def artifact(place: Path) -> Path:
    """As the quantize stage leaves it: the folder, what was folded into it, the record; and a nested file."""
    for path in (
        place / "model.safetensors",
        place / "original" / "params.json",
        folds_folder(place) / "0.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode() * 100)
    record_path(place).write_text("{}")
    return place


def everything(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place.parent)): path.read_bytes() for path in place.parent.rglob("*") if path.is_file()
    }


def test_a_copy_is_the_artifact_with_all_that_stands_beside_it(url: str, tmp_path: Path) -> None:
    place = artifact(tmp_path / "one" / "nf4-0123")
    (place / ".partial").write_text("another process's")
    elsewhere = tmp_path / "two" / "nf4-0123"
    storage = Storage(url)
    assert not storage.restore(elsewhere)
    assert not elsewhere.parent.exists() or not list(elsewhere.parent.iterdir())
    storage.keep(place)
    (place / ".partial").unlink()
    assert storage.restore(elsewhere)
    assert everything(elsewhere) == everything(place)
    # What was verified meanwhile is kept too, and nothing else is copied again.
    assert storage.manifest(place) is None
    (place / MANIFEST).write_text("verdict")
    storage.keep(place)
    assert storage.manifest(place) == b"verdict"
    assert storage.restore(elsewhere)
    assert everything(elsewhere) == everything(place)
    storage.remove(place)
    assert not storage.restore(tmp_path / "three" / "nf4-0123")
    storage.remove(place)


def test_only_what_changed_is_copied_again(tmp_path: Path) -> None:
    place, storage = artifact(tmp_path / "one" / "nf4-0123"), Storage(str(tmp_path / "storage"))
    storage.keep(place)
    weights = tmp_path / "storage" / "artifacts" / place.name / "artifact" / "model.safetensors"
    before = weights.stat().st_ino
    (place / MANIFEST).write_text("verdict")
    storage.keep(place)
    assert weights.stat().st_ino == before
    (place / "model.safetensors").write_text("other")
    storage.keep(place)
    assert weights.read_text() == "other"


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_a_copy_that_is_not_whole_counts_as_absent(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever file is missing, cut short or changed by one byte, the folder stays as it was."""
    root = tmp_path / "storage"
    shutil.rmtree(root, ignore_errors=True)
    storage = Storage(str(root))
    storage.keep(artifact(tmp_path / "one" / "nf4-0123"))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    hit = data.draw(st.sampled_from(files))
    content = hit.read_bytes()
    match data.draw(st.sampled_from(["gone", "short", "changed"])):
        case "gone":
            hit.unlink()
        case "short":
            hit.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "changed":
            at = data.draw(st.integers(0, len(content) - 1))
            hit.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    place = tmp_path / "two" / "nf4-0123"
    place.mkdir(parents=True, exist_ok=True)
    (place / "here").write_text("before")
    restored = storage.restore(place)
    # The index isn't part of the artifact: a space changed in it changes nothing.
    if restored:
        assert hit.name == KEPT
        assert everything(place) == everything(tmp_path / "one" / "nf4-0123")
        shutil.rmtree(place.parent)
    else:
        assert everything(place) == {"nf4-0123/here": b"before"}


def test_an_index_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    storage.keep(artifact(tmp_path / "one" / "nf4-0123"))
    index = tmp_path / "storage" / "artifacts" / "nf4-0123" / KEPT
    for path in ("artifact/../../../x", "/etc/x", "beside/../../x"):
        index.write_text(json.dumps({"files": {path: {"sha256": "0", "size": 0}}}))
        assert not storage.restore(tmp_path / "two" / "nf4-0123")
    assert not (tmp_path / "two").exists()


def test_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = artifact(tmp_path / "one" / "nf4-0123")
    with pytest.raises(ZooError, match="storage: no file system for 'nosuch://bucket'"):
        Storage("nosuch://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(HubRefused, match=r"storage: .*no folder that this user may write to"):
        Storage(str(tmp_path / "file")).check()
    storage = Storage(str(tmp_path / "storage"))
    storage.keep(place)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage._files, "copy", full)
        (place / "new").write_text("x")
        with pytest.raises(HubUnavailable, match=r"storage .*nf4-0123: OSError.*No space left"):
            storage.keep(place)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DiskFull, match="no space left for"):
            storage.restore(tmp_path / "two" / "nf4-0123")
    assert not list((tmp_path / "two").iterdir())


def stages(of: Job, *stages: tuple[Stage, str | None]) -> None:
    for stage, name in stages:
        result = run_stage(of, stage, name)
        assert result.failure is None, result.failure


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_another_node_goes_on_with_what_the_lost_one_made(tmp_path: Path) -> None:
    shared = {
        "storage": str(tmp_path / "storage"),
        "destination": Destination(endpoint=str(tmp_path / "published")),
    }
    lost, other = (
        job(LLAMA, tmp_path / name, "awq-w4-g128", "bnb-nf4").model_copy(update=shared) for name in ("lost", "other")
    )
    orders = tuple(order.model_copy(update={"repo_id": f"acme/{order.recipe.name}"}) for order in lost.orders)
    lost, other = (of.model_copy(update={"orders": orders}) for of in (lost, other))
    stages(lost, (Stage.FETCH, None), (Stage.QUANTIZE, None), (Stage.KEEP, "awq-w4-g128"), (Stage.KEEP, "bnb-nf4"))
    made = {order.recipe.name: folder_sha256(artifact_folder(lost.workspace, order)) for order in orders}
    shutil.rmtree(lost.workspace)
    stages(other, (Stage.FETCH, None))
    assert {order.recipe.name: folder_sha256(artifact_folder(other.workspace, order)) for order in orders} == made
    result = run_stage(other, Stage.QUANTIZE)
    assert result.failure is None, result.failure
    assert not list(Path(other.workspace).glob("passes/*")), "nothing is left to be made"
    for name in made:
        verified = run_stage(other, Stage.VERIFY, name)
        assert verified.manifest is not None, verified.failure
        assert verified.manifest.verdict.accepted, verified.manifest.verdict.reasons
        stages(other, (Stage.PUBLISH, name))
    assert not list((tmp_path / "storage").rglob("*.safetensors")), "what's published needs no copy"
