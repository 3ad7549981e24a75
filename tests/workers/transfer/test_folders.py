"""A folder of any file system as destination: whole revisions, and one file that names the current one."""

import json
import os
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.workers.published import artifact, seal
from workers.errors import CheckpointError, HubRefused, ZooError
from workers.spec.job import Destination
from workers.spec.workspace import MANIFEST
from workers.transfer import destinations
from workers.transfer.artifact import open_accepted
from workers.transfer.filesystems import FileSystem
from workers.transfer.to_folder import MAIN, FolderStore

REPO = "acme/model-bnb-nf4"
DAY = date(2026, 11, 21)
OURS, LATER = "quantmill-ffffffffffff", "quantmill-eeeeeeeeeeee"


@pytest.fixture(params=["file", "path", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        from fsspec.implementations.memory import MemoryFileSystem

        MemoryFileSystem.store.clear()
        yield "memory://models"
        MemoryFileSystem.store.clear()
    else:
        yield f"file://{tmp_path}/out" if request.param == "file" else str(tmp_path / "out")


def publish(root: str, folder: Path, day: date = DAY, **terms: Any) -> str:
    return destinations.publish(Destination(endpoint=root, **terms), REPO, folder, today=lambda: day)


def store(root: str) -> Any:
    return FolderStore(root)


def main(root: str) -> dict[str, Any]:
    made = store(root).current(REPO)
    assert made is not None
    dumped: dict[str, Any] = made.model_dump()
    return dumped


def below(root: str) -> FileSystem:
    return FileSystem(root, "publish.endpoint")


def files(root: str, revision: str) -> dict[str, bytes]:
    found = below(root)
    return {path: found.read(f"{REPO}/{revision}/{path}") or b"" for path in found.sizes(f"{REPO}/{revision}")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_whole_revision_and_a_file_that_names_it(root: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    assert publish(root, folder) == OURS
    assert files(root, OURS) == content(folder)
    assert (main(root)["revision"], main(root)["days"]) == (OURS, {"2026-11-21": OURS})
    found = destinations.standing(root, REPO, "f" * 64)
    assert found is not None
    assert (found[0].fingerprint, found[1]) == ("f" * 64, OURS)
    assert destinations.standing(root, REPO, "e" * 64) is None
    assert destinations.standing(root, "acme/nothing", "f" * 64) is None


def test_again_changes_nothing(root: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    publish(root, folder)
    before = main(root)
    assert destinations.preview(Destination(endpoint=root), REPO, folder) == []
    assert publish(root, folder, date(2026, 11, 22)) == OURS
    assert main(root) == before


def test_a_later_one_leaves_the_earlier_readable(root: str, tmp_path: Path) -> None:
    first = artifact(tmp_path / "a")
    publish(root, first)
    publish(root, artifact(tmp_path / "b", "two", "e" * 64))
    assert (main(root)["revision"], main(root)["days"]) == (LATER, {"2026-11-21": OURS, "2026-11-21.2": LATER})
    assert files(root, OURS) == content(first)


def test_other_bytes_never_go_into_a_revision_that_stands(root: str, tmp_path: Path) -> None:
    first, second = artifact(tmp_path / "a"), artifact(tmp_path / "b", "judged again")
    publish(root, first)
    assert publish(root, second) == f"{OURS}.2"
    assert files(root, OURS) == content(first)
    assert files(root, f"{OURS}.2") == content(second)
    assert publish(root, first) == OURS, "back to the first"
    assert main(root)["revision"] == OURS


def test_a_publish_that_died_is_completed_in_its_place(root: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    below(root).copy(folder / "config.json", f"{REPO}/{OURS}/config.json")
    assert destinations.standing(root, REPO, "f" * 64) is None
    assert destinations.preview(Destination(endpoint=root), REPO, folder)[:3] == [
        f"upload {OURS}/README.md ({(folder / 'README.md').stat().st_size} bytes)",
        f"upload {OURS}/model.safetensors (3,000 bytes)",
        f"upload {OURS}/{MANIFEST} ({(folder / MANIFEST).stat().st_size:,} bytes)",
    ]
    assert publish(root, folder) == OURS
    assert files(root, OURS) == content(folder)


def test_only_the_newest_are_kept(root: str, tmp_path: Path) -> None:
    for number, letter in enumerate("abc"):
        publish(root, artifact(tmp_path / letter, letter, letter * 64), date(2026, 11, 21 + number), keep=2)
    assert main(root)["days"] == {"2026-11-22": f"quantmill-{'b' * 12}", "2026-11-23": f"quantmill-{'c' * 12}"}
    assert files(root, f"quantmill-{'a' * 12}") == {}
    assert files(root, f"quantmill-{'b' * 12}") == content(tmp_path / "b")


def test_what_was_rejected_or_changed_stays_here(root: str, tmp_path: Path) -> None:
    with pytest.raises(HubRefused, match="was rejected"):
        publish(root, artifact(tmp_path / "a", accepted=False))
    checked = open_accepted(artifact(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x" * 3000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed since it was verified"):
        store(root).publish(REPO, checked, Destination(endpoint=root), DAY)
    assert store(root).current(REPO) is None
    assert MANIFEST not in files(root, OURS)
    assert "model.safetensors" not in files(root, OURS)


@pytest.mark.parametrize("change", ["edited", "added", "removed", MANIFEST, MAIN, "foreign"])
def test_what_somebody_else_changed_is_not_replaced_without_force(root: str, tmp_path: Path, change: str) -> None:
    there = below(root)
    if change != "foreign":
        publish(root, artifact(tmp_path / "a"))
    match change:
        case "edited":
            name = "config.json"
            there.replace(f"{REPO}/{OURS}/{name}", b"{}")
        case "added" | "foreign":
            name = "notes.txt"
            there.replace(f"{REPO}/{OURS}/{name}" if change == "added" else f"{REPO}/{name}", b"mine")
        case "removed":
            name = "README.md"
            there.remove_file(f"{REPO}/{OURS}/{name}")
        case _:
            name = change
            there.replace(f"{REPO}/{name}" if name == MAIN else f"{REPO}/{OURS}/{name}", b"{}")
    later = artifact(tmp_path / "b", "two", "e" * 64)
    with pytest.raises(HubRefused, match=rf"{name}.*--force"):
        publish(root, later)
    assert publish(root, later, force=True) == LATER
    assert files(root, LATER) == content(later)


def test_a_reader_of_main_never_sees_half_a_state(tmp_path: Path) -> None:
    """It reads main.json all the time, and each time all files of the revision that it names."""
    root, stop, torn, seen = str(tmp_path / "out"), threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            path = tmp_path / "out" / REPO / MAIN
            if not path.exists():
                continue
            told = json.loads(path.read_text())
            folder = path.parent / told["revision"]
            meant = json.loads((folder / MANIFEST).read_text())["files"]
            sizes = {name: (folder / name).stat().st_size for name in meant}
            if sizes != {name: entry["size"] for name, entry in meant.items()}:
                torn.append(told)
            seen.add(told["revision"])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        publish(root, artifact(tmp_path / "a", f"text {number}", f"{number:064x}"[::-1]))
    stop.set()
    reader.join()
    assert not torn
    assert len(seen) > 1


def test_a_killed_publisher_leaves_the_old_state_and_the_next_completes(tmp_path: Path) -> None:
    """Killed at every write in turn: what can be read is the old revision or the new one, never between."""
    root = tmp_path / "out"
    publish(str(root), artifact(tmp_path / "a"))
    later = artifact(tmp_path / "b", "two", "e" * 64)
    for at in range(1, 12):
        done = fork_and_die_at(at, lambda: publish(str(root), later))
        told = json.loads((root / REPO / MAIN).read_text())
        whole = content(tmp_path / ("b" if told["revision"] == LATER else "a"))
        assert {path.name: path.read_bytes() for path in (root / REPO / told["revision"]).iterdir()} == whole
        if done:
            break
    else:
        pytest.fail("it never came to its end")
    assert told["revision"] == LATER
    assert at > 3, "it died several times on its way"


def fork_and_die_at(at: int, action: Any) -> bool:
    """Run in a child that ends without a trace when it gives the ``at``-th file its name; whether it came through."""
    child = os.fork()
    if child == 0:
        left = [at]
        replace = Path.replace

        def dying(self: Path, target: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return replace(self, target)

        Path.replace = dying  # type: ignore[method-assign]
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("repo_id", ["../x", "acme/..", "acme", "a/b/c", "/etc"])
def test_a_name_can_not_climb_out(tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(ZooError, match="expected namespace/name"):
        destinations.publish(Destination(endpoint=str(tmp_path)), repo_id, artifact(tmp_path / "a"))


def test_a_file_system_that_is_not_there_is_named(tmp_path: Path) -> None:
    for url in ("nosuch://bucket", "s3://bucket/models"):
        with pytest.raises(ZooError, match=f"publish.endpoint: no file system for '{url}'"):
            FolderStore(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(HubRefused, match="no folder that this user may write to"):
        FolderStore(str(tmp_path / "file")).check()
    FolderStore(str(tmp_path / "new" / "folder")).check()
    assert not (tmp_path / "new").exists()


def test_seal_is_what_the_check_reads(tmp_path: Path) -> None:
    assert open_accepted(seal(artifact(tmp_path / "a"))).message == "bnb-nf4 of model@r"
