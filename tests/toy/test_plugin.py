"""Extending without a fork: a file adds a format, a runtime and a recipe to the command line and to every process."""

from __future__ import annotations

import json
import re
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


@pytest.fixture
def house_rules(tmp_path: Path) -> Path:
    """The example of docs/extending.md, as files, and a zoo with it."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (module,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "house_rules.py").write_text(module)
    named = re.match(r"# (recipes/[\w-]+\.yaml)\n", recipe)
    assert named is not None
    (tmp_path / named[1]).parent.mkdir()
    (tmp_path / named[1]).write_text(recipe)
    return zoo_file(tmp_path, plugins=["house_rules.py"], recipes=["median-w4", "bnb-int8"])


def test_a_method_of_quantmill_stays_what_it_is(house_rules: Path) -> None:
    module = house_rules.with_name("house_rules.py")
    module.write_text(module.read_text().replace('add_method("median"', 'add_method("gptq"'))
    said = quantmill("plan", str(house_rules), cwd=house_rules.parent, PYTHONPATH=str(ROOT))
    assert said.returncode == 2
    assert "house_rules.py' can't be imported (add_method: 'gptq' is a method of quantmill's own; choose" in said.stderr


def test_a_method_of_a_plugin_is_planned_and_its_numbers_are_its_identity(house_rules: Path) -> None:
    def fingerprint() -> str:
        said = quantmill("plan", str(house_rules), "--json", cwd=house_rules.parent, PYTHONPATH=str(ROOT))
        assert said.returncode == 0, said.stderr
        cells = {cell["recipe"]: cell["fingerprint"] for cell in json.loads(said.stdout)["artifacts"]}
        return str(cells["median-w4"])

    before = fingerprint()
    module, recipe = house_rules.with_name("house_rules.py"), house_rules.parent / "recipes" / "median-w4.yaml"
    module.write_text(module.read_text().replace('"house_rules:solve"', '"house_rules:solve", numerics=2'))
    raised = fingerprint()
    recipe.write_text(recipe.read_text().replace("2.5", "3.0"))
    assert len({before, raised, fingerprint()}) == 3


@pytest.mark.slow
def test_the_example_of_the_docs_makes_judges_and_tells(house_rules: Path) -> None:
    said = quantmill("run", str(house_rules), "--json", cwd=house_rules.parent, PYTHONPATH=str(ROOT))
    entries = {entry["recipe"]: entry for entry in json.loads(said.stdout)["artifacts"]}
    assert entries["median-w4"]["status"] == "verified", entries["median-w4"]
    assert entries["median-w4"]["metrics"]["kl_mean"] < 0.05
    assert entries["bnb-int8"]["status"] == "rejected"
    by_the_gate = r"REGRESSION: gate 'size': \d+ bytes, expected at most 3950000; choose fewer bits"
    assert re.fullmatch(by_the_gate, entries["bnb-int8"]["reason"])
    told = house_rules.with_name("last-night.txt").read_text()
    assert told.startswith("quantmill toys: failed (1 rejected, 1 verified)")
    assert "rejected: llama-tiny bnb-int8: REGRESSION: gate 'size'" in told
