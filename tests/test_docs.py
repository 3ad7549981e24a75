"""What the docs name is there: links lead somewhere, files that are named exist."""

import re
from pathlib import Path

import pytest

from pipeline.cli.reference import PAGES as PAGES_MADE
from pipeline.zoo import reference

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
    assert (ROOT / "docs/reference" / name).read_text() == PAGES_MADE[name](), "`make tables` prints them anew"
