"""What infra/ and the README tell people to run exists."""

import configparser
import re
import shlex
from pathlib import Path

import pytest

from pipeline import shipped
from pipeline.cli import main

ROOT = Path(__file__).parents[2]


def test_the_timer_starts_a_command_that_exists() -> None:
    units = {}
    for path in (ROOT / "infra" / "systemd").iterdir():
        parser = configparser.ConfigParser(interpolation=None, strict=True)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(path.read_text())
        units[path.suffix] = parser
    command = shlex.split(units[".service"]["Service"]["ExecStart"])
    assert command[1] in main.commands
    assert (ROOT / command[2]).is_file()
    assert units[".timer"]["Install"]["WantedBy"] == "timers.target"


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?quantmill ([a-z]+)", text)) & {*main.commands, "verify", "submit", "recommend", "env"}
    assert named
    assert named <= set(main.commands)
    targets = set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
    assert targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_every_recipe_is_in_the_readme(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()
