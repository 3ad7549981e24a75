"""Generate the README's tables of recipes and formats: ``python -m pipeline.zoo.tables README.md``.

The text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced; a test checks that the README is up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pipeline.zoo import outcomes, shipped
from pipeline.zoo.outcomes import Outcome
from workers.machine.files import write_text
from workers.spec.formats import FORMATS
from workers.spec.layers import LayerKinds
from workers.spec.recipes import Recipe, words
from workers.spec.runtimes import RUNTIMES, checking


def recipes_table() -> str:
    """Markdown table of the shipped recipes, and of the runtimes that read their artifacts."""
    found = outcomes.read()
    rows = [
        (f"`{r.name}`", r.method, _scheme(r), r.format, _checked(r), _also(r, found))
        for r in map(shipped.recipe, shipped.recipe_names())
    ]
    return _table(("recipe", "method", "scheme", "format", "checked in", "also read by"), rows)


def formats_table() -> str:
    """Markdown table of the formats: contents, and the packages needed beside the runtime that checks each."""
    rows = []
    for row in FORMATS.values():
        runtime = checking(row.name)
        packages = [f"`{name}`" for name in runtime.packages.get(row.name, ())]
        extra = sorted({runtime.extras[name] for name in runtime.packages.get(row.name, ()) if name in runtime.extras})
        needs = " and ".join(packages) or f"{runtime.name} alone"
        if runtime.environment:
            needs = f"{needs}; checked in the environment `{runtime.environment}`"
        rows.append((row.name, row.says, f"{needs} (`{extra[0]}`)" if extra else needs))
    return _table(("format", "holds", "loading needs"), rows)


TABLES = {"recipes": recipes_table, "formats": formats_table}


def rewritten(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """The text with those of the tables that it has regenerated."""
    for name, table in tables.items():
        if f"<!-- {name} -->" not in text:
            continue
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)  # type: ignore[misc]
    return text


def _scheme(recipe: Recipe) -> str:
    kinds = LayerKinds(experts=True, mixture=True)
    dense = checking(recipe.format).reads(recipe.format, recipe.scheme, kinds) is not None
    return f"{words(recipe)}{'; dense models' if dense else ''}"


def _checked(recipe: Recipe) -> str:
    return checking(recipe.format).name


def _also(recipe: Recipe, found: Iterable[Outcome]) -> str:
    """The other runtimes that read a recipe's artifacts, with what was seen of them (docs/runtimes.md)."""
    mixed = bool(getattr(recipe, "overrides", ()))
    readers = []
    for row in RUNTIMES.values():
        kinds = LayerKinds(mixed=mixed)
        rule = row.reads(recipe.format, recipe.scheme, kinds) if recipe.format in row.rules else "another format"
        if rule is None and row is not checking(recipe.format):
            dense = row.reads(recipe.format, recipe.scheme, kinds._replace(experts=True, mixture=True)) is not None
            seen = outcomes.in_short(found, recipe.name, row.name) or "not tried"
            readers.append(f"{row.name}{' (dense models)' if dense else ''}: {seen}")
    return ", ".join(readers)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    write_text(readme, rewritten(readme.read_text()))
