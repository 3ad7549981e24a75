"""Walks through all families, and writes what each did to tests/walk/OUTCOMES.md: `python -m tests.walk.table`.

A family with a row stays as it is: remove rows to walk through those again. PYTHONPATH=.venv-towers, as in `make walk`,
has the packages that towers need.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.walk.check import check
from tests.walk.smallest import families, loader
from workers.spec.families import FAMILIES

TABLE = Path(__file__).with_name("OUTCOMES.md")
README = TABLE.parents[2] / "README.md"
# Where the README says how many families go all the way.
COUNTED = re.compile(r"(<!-- walk -->).*?(<!-- /walk -->)", re.DOTALL)
COLUMNS = ("family", "class", "plan", "stream, GPTQ, AWQ, load", "share in codes", "seconds")


def main() -> None:
    """Walk through what the table lacks, of the kinds that the arguments name (causal, multimodal; none: both)."""
    kinds = [kind == "multimodal" for kind in sys.argv[1:] or ("causal", "multimodal")]
    for multimodal in kinds:
        for family in families(multimodal=multimodal):
            name = loader(family, multimodal=multimodal).__name__
            if (family, name) not in known():
                row = _walked(family, multimodal=multimodal)
                rows = {**known(), (family, name): (family, name, *row)}
                TABLE.write_text(rendered(rows))
    README.write_text(with_counts(README.read_text()))


def with_counts(text: str) -> str:
    """The README with the counts of the table."""
    return COUNTED.sub(lambda found: f"{found[1]}{counts(known())}{found[2]}", text)


def known() -> dict[tuple[str, str], tuple[str, ...]]:
    """The table's rows, by family and class."""
    lines = TABLE.read_text().splitlines() if TABLE.is_file() else []
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")]
    return {(row[0], row[1]): row for row in cells[2:]}


def counts(rows: dict[tuple[str, str], tuple[str, ...]]) -> str:
    """How many families of both kinds go all the way, of how many with a row, of how many that there are."""
    said = []
    for multimodal, kind in ((False, "causal language models"), (True, "multimodal ones")):
        part = [row for row in rows.values() if (row[1] != "AutoModelForCausalLM") == multimodal]
        done = sum(row[3].startswith("all") for row in part)
        said.append(f"{done} of {len(part)} {kind} (transformers has {len(families(multimodal=multimodal))})")
    return " and ".join(said)


def rendered(rows: dict[tuple[str, str], tuple[str, ...]]) -> str:
    """The table as Markdown."""
    version = importlib.metadata.version("transformers")
    lines = [
        "# What each family of transformers did",
        "",
        f"The smallest model of every type, saved under the class that publishers use, transformers {version}: "
        f"{counts(rows)} go all the way; where a cell names formats, in those instead of compressed-tensors' integers. "
        "Written by `python -m tests.walk.table`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows.values()),
    ]
    return "\n".join(lines) + "\n"


def _walked(family: str, *, multimodal: bool) -> tuple[str, ...]:
    """The cells of a family's row after its class."""
    start, row = time.monotonic(), FAMILIES.get(family)
    why = row and (row.refused or (row.refused_whole if multimodal else row.refused_alone))
    if row and row.package and find_spec(row.package) is None:
        return (f"refused: its class needs the package {row.package}, which isn't installed", "", "", "")
    if why:
        return (f"refused: {why}", "", "", "")
    folder = Path(tempfile.mkdtemp(prefix="walk-"))
    try:
        outcome = check(family, folder, multimodal=multimodal)
    except Exception as error:
        said = " ".join(str(error).split())[:160].replace("|", "/")
        return ("taken", f"{type(error).__name__}: {said}", "", f"{time.monotonic() - start:.0f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    done = f"all, in {outcome.format}" if outcome.format else "all"
    if outcome.refused:
        done = f"stream; {outcome.refused[:100].replace('|', '/')}"
    return ("taken", done, f"{outcome.share:.2f}", f"{time.monotonic() - start:.0f}")


if __name__ == "__main__":
    main()
