"""Extending without a fork: a file adds a format, a runtime and a recipe to the command line and to every process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.pipeline.cli.terminal import quantmill
from tests.workers.jobs import ZOO

PLUGIN = Path(__file__).with_name("plugin.py")
TEXT = ZOO / "text"
ROOT = Path(__file__).parents[2]


def zoo_file(folder: Path, **changed: object) -> Path:
    raw = {
        "name": "toys",
        "plugins": [str(PLUGIN)],
        "models": [{"id": str(ZOO / "models" / "llama-tiny")}],
        "recipes": ["toy-w8"],
        "verify": {"dataset": {"path": "text", "data_files": [str(TEXT / "heldout.txt")]}, "tokens": 8192},
    }
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump({**raw, **changed}))
    return path


def test_the_variable_adds_rows_to_the_command_line(tmp_path: Path) -> None:
    with_it = quantmill("recipes", "--json", cwd=tmp_path, QUANTMILL_PLUGINS=str(PLUGIN), PYTHONPATH=str(ROOT))
    found = {row["name"]: row for row in json.loads(with_it.stdout)}
    assert found["toy-w8"]["runtimes"] == ["toyrun"]
    assert found["toy-w8"]["format"] == "toy"
    without = quantmill("recipes", "--json", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "toy-w8" not in without.stdout


def test_a_plugin_that_is_broken_is_named_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    said = quantmill("plan", str(zoo_file(tmp_path, plugins=["broken.py"])), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert said.returncode == 2
    assert "broken.py' can't be imported (No module named 'nothing_of_that_name'); mend it" in said.stderr
    said = quantmill("recipes", cwd=tmp_path, QUANTMILL_PLUGINS=str(tmp_path / "gone.py"), PYTHONPATH=str(ROOT))
    assert said.returncode == 2
    assert "no such file, looked at" in said.stderr


def test_a_zoo_names_its_plugins(tmp_path: Path) -> None:
    said = quantmill("plan", str(zoo_file(tmp_path)), "--json", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert said.returncode == 0, said.stderr
    assert [cell["recipe"] for cell in json.loads(said.stdout)["artifacts"]] == ["toy-w8"]


@pytest.mark.slow
def test_what_a_plugin_adds_is_made_verified_and_said(tmp_path: Path) -> None:
    said = quantmill("run", str(zoo_file(tmp_path)), "--json", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert said.returncode == 0, said.stderr
    (entry,) = json.loads(said.stdout)["artifacts"]
    assert entry["status"] == "verified", entry
    assert entry["runtime"]["name"] == "toyrun"
