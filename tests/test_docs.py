"""What the docs name is there: links lead somewhere, files that are named exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli.main import main
from pipeline.cli.reference import PAGES as PAGES_MADE
from pipeline.cli.reference import with_measured
from pipeline.zoo import reference, shipped
from pipeline.zoo import zoo as zoos
from tests.walk.table import with_counts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Written into paths that stand for many: X, NAME.
STANDS_FOR_MANY = re.compile(r"\b(X|to_X|NAME)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    named = re.findall(r"`((?:workers|pipeline|tests|configs|docs|infra)/[\w./-]*)`", text)
    missing += [name for name in named if not STANDS_FOR_MANY.search(name) and not (ROOT / name).exists()]
    assert not missing


def test_every_decision_is_in_the_list() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text()
    for page in (ROOT / "docs/decisions").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index
        assert len(page.read_text().splitlines()) <= 60, "one page"


def test_every_key_of_a_zoo_is_described() -> None:
    made = reference.schema()
    for name, model in {"Zoo": made, **made["$defs"]}.items():
        for key, value in model.get("properties", {}).items():
            assert len(value["description"].split()) > 1, f"{name}.{key}"


@pytest.mark.parametrize("name", PAGES_MADE)
def test_the_reference_pages_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES_MADE[name](), "`make tables` prints them anew"


def blocks(language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language in the docs, with the page of each."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    return [(str(page.relative_to(ROOT)), text) for page in PAGES for text in fence.findall(page.read_text())]


ZOOS = [(page, text) for page, text in blocks("yaml") if page.startswith("docs/") and "\nmodels:" in text]
COMMANDS = [(page, line) for page, text in blocks("sh") for line in text.strip().splitlines()]


@pytest.mark.parametrize(("page", "text"), ZOOS)
def test_every_zoo_that_is_shown_is_one(page: str, text: str) -> None:
    raw = zoos.parse(text, page)
    assert isinstance(raw, dict)
    if raw["recipes"] == zoos.AUTO:  # chosen with the models' headers, which these don't have
        assert zoos.Budget.model_validate(raw["budget"])
        raw["recipes"] = ["bnb-nf4"]
    assert zoos.check(raw, page).models


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_that_is_shown_is_taken(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, options and their values; shipped recipes exist."""
    name, *arguments = shlex.split(line, comments=True)
    assert name == "quantmill"
    command: click.Command = main
    context = click.Context(main, info_name="quantmill")
    while isinstance(command, click.Group):
        chosen, arguments = arguments[0], arguments[1:]
        assert chosen in command.commands, f"{page}: {line}"
        command = command.commands[chosen]
    for argument in arguments:  # folders of the reader's
        if argument.startswith("runs/artifacts/"):
            (tmp_path / argument).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = command.make_context(chosen, arguments, parent=context).params
    for recipe in given.get("recipes") or ():
        assert recipe in shipped.recipe_names()


def test_there_is_something_to_check() -> None:
    assert len(ZOOS) >= 6
    assert len(COMMANDS) >= 25


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w/.-]+\.md)$", text, re.M)
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    decisions = {name for name in there if name.startswith("decisions/")} - {"decisions/README.md"}
    assert sorted(listed) == sorted(there - decisions)


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_that_is_shown_compiles(page: str, text: str) -> None:
    compile(text, page, "exec")


@pytest.mark.parametrize("page", ["choosing", "methods"])
def test_the_tables_of_what_was_measured_are_up_to_date(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    assert text == with_measured(text)
    assert text.count("| `gptq-w4-g128` |") == 1


def test_the_readme_counts_the_families_that_the_walk_took() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_counts(text) == text, "`python -m tests.walk.table` prints the counts anew"
    assert "<!-- walk -->" in text
