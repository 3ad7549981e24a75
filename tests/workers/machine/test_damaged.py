"""Damaged state is set aside or made anew, whatever it holds."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fleet.leases import Holder, LeaseTable, new_owner, of_this_machine
from pipeline.report.ledger import Ledger
from tests.limits import SOON_SECONDS
from tests.pipeline.fleet.test_decisions import job
from workers.errors import PreflightError, ZooError
from workers.machine import database, environments
from workers.machine.files import read_model, set_aside
from workers.quantize.inputs import existing_artifacts
from workers.quantize.resume import NotResumable, PassFolder, PassState
from workers.spec.job import ArtifactMade
from workers.spec.workspace import artifact_folder, layout_path, record_path

TABLES = {"kept": ("key", "value")}
SCHEMA = "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT)"


def database_bytes(path: Path, rows: int = 300) -> bytes:
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    with connection:
        connection.executemany("INSERT INTO kept VALUES (?, ?)", ((f"k{n}", "v" * 50) for n in range(rows)))
    connection.close()
    return path.read_bytes()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), how=st.sampled_from(["garbage", "truncated", "flipped", "header"]))
def test_whatever_a_database_holds_it_can_be_used_afterwards(
    tmp_path_factory: pytest.TempPathFactory, seed: int, how: str
) -> None:
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("damaged")
    path = folder / "kept.sqlite"
    data = bytearray(database_bytes(path))
    match how:
        case "garbage":
            data = bytearray(chance.randbytes(chance.randrange(1, 5000)))
        case "truncated":
            data = data[: chance.randrange(1, len(data))]
        case "flipped":
            for _ in range(200):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case "header":
            data[: chance.randrange(1, 100)] = chance.randbytes(1)
    path.write_bytes(bytes(data))
    connection = database.open_database(path, SCHEMA, TABLES)
    with connection:
        connection.execute("INSERT OR REPLACE INTO kept VALUES ('new', 'row')")
    assert connection.execute("SELECT value FROM kept WHERE key = 'new'").fetchone() == ("row",)
    connection.close()
    (aside,) = [*folder.glob("kept.sqlite.damaged-*")] or [None]
    assert aside is None or aside.read_bytes() == bytes(data), "what was there is kept"


def test_an_older_ledger_is_set_aside_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.execute("CREATE TABLE runs (run_id TEXT, started TEXT)")
    connection.close()
    with Ledger(tmp_path) as ledger:
        ledger.start("r", "zoo", "now")
        assert len(ledger.runs()) == 1
    (aside,) = tmp_path.glob("ledger.sqlite.damaged-*")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "table runs has no zoo, started_at, finished_at, status" in said
    assert aside.name in said


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_locked_one_is_waited_for_and_then_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    database_bytes(path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ZooError, match="another program keeps it locked, waited for 1 s") as caught:
            database.open_database(path, SCHEMA, TABLES, seconds=1)
        assert str(path) in str(caught.value)
    finally:
        holder.stdin.close()
        holder.wait(SOON_SECONDS)
        holder.stdout.close()
    database.open_database(path, SCHEMA, TABLES, seconds=1).close()
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_folder_in_its_place_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "kept.sqlite").mkdir()
    database.open_database(tmp_path / "kept.sqlite", SCHEMA, TABLES).close()
    assert len(list(tmp_path.glob("kept.sqlite.damaged-*"))) == 1


@pytest.mark.parametrize("content", [b"garbage", b"", b"SQLite format 3\0" + bytes(500)])
def test_leases_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "quantmill").mkdir()
    (tmp_path / "quantmill/leases.sqlite").write_bytes(content)
    assert of_this_machine().take(new_owner("run"), ["x"])
    assert not of_this_machine().take("another " + new_owner("run").split(" ", 1)[1], ["x"]), "it's a file's again"


def test_leases_without_a_folder_and_with_odd_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert of_this_machine().take("a", ["x"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = of_this_machine()
    for owner in ("", "x", "a b c", "run -1 5", "run ² 5"):
        table._connection.execute("INSERT OR REPLACE INTO leases VALUES ('k', ?, 'soon')", (owner,))
        assert table.take("me", ["k"]), owner


def test_a_lease_file_that_breaks_while_at_work_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "leases.sqlite"
    holder = Holder(LeaseTable(str(path)), "me", lambda *_: None)
    path.write_bytes(b"garbage" * 1000)
    assert holder.hold(0, job("bnb-nf4"))
    holder.renew()
    holder.let_go(0)
    holder.close()


# ----------------------------------------------------------------------------------------- what stages leave

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CONTENT = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)


@given(content=CONTENT)
def test_records_of_any_content_are_set_aside_and_their_artifacts_made_anew(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    workspace = tmp_path_factory.mktemp("work")
    one = job("bnb-nf4").model_copy(update={"workspace": str(workspace)})
    folder = artifact_folder(workspace, one.orders[0])
    folder.mkdir(parents=True)
    record_path(folder).write_text(ArtifactMade(recipe="bnb-nf4", path="", bytes=1, seconds=1).model_dump_json())
    assert existing_artifacts(one)[1] == []
    for path in (layout_path(folder), record_path(folder)):
        path.write_bytes(content)
        assert existing_artifacts(one) == ({}, [one.orders[0]])
        assert len(list(path.parent.glob(f"{path.name}.damaged-*"))) == 1
        assert not path.exists()


@given(content=CONTENT, hidden=CONTENT)
def test_a_saved_pass_of_any_content_is_no_pass(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, hidden: bytes
) -> None:
    folder = PassFolder(tmp_path_factory.mktemp("pass"))
    (folder.path / "state.json").write_bytes(content)
    assert folder.load() is None
    group = {"structure": "T", "door": ""}
    state = PassState(layers=1, micro_batch_tokens=8, makers={}, failed={}, groups={"a": group})  # type: ignore[dict-item]
    (folder.path / "hidden-00001.safetensors").write_bytes(hidden)

    class Lanes:
        device = "cpu"

    with pytest.raises(NotResumable):
        folder.replay(state, {"a": Lanes()})  # type: ignore[dict-item]


@pytest.mark.parametrize("names", [["a"], ["a.b"], ["x.0.0"], ["a.0.0.0"], []])
@pytest.mark.parametrize("structure", ["T", "(TT)", "", "X", "(T-"])
def test_hidden_states_under_odd_names_are_no_pass(tmp_path: Path, names: list[str], structure: str) -> None:
    import torch
    from safetensors.torch import save_file

    folder = PassFolder(tmp_path)
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "hidden-00001.safetensors")
    group = {"structure": structure, "door": ""}
    state = PassState(layers=1, micro_batch_tokens=8, makers={}, failed={}, groups={"a": group})  # type: ignore[dict-item]

    class Lanes:
        device = "cpu"

        def replay(self, layers: int, outputs: list[object]) -> None:
            raise ValueError("zip() argument 2 is shorter than argument 1")

    with pytest.raises(NotResumable):
        folder.replay(state, {"a": Lanes()})  # type: ignore[dict-item]


@given(content=CONTENT)
def test_an_environments_record_of_any_content_is_named(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    root = tmp_path_factory.mktemp("envs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTMILL_ENVS", str(root))
        (root / "gguf").mkdir()
        (root / "gguf" / environments.RECORD).write_bytes(content)
        with pytest.raises(PreflightError, match="quantmill env remove gguf"):
            environments.built("gguf")


def test_what_is_not_there_needs_no_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_model(tmp_path / "none", ArtifactMade) is None
    assert set_aside(tmp_path / "none", "is damaged") is None
    assert capsys.readouterr().err == ""
