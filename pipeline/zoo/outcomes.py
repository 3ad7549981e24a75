"""What loading the shipped recipes in each runtime came to: read from docs/runtimes.json, printed as docs/runtimes.md.

``make runtimes`` measures it (``tests/zoo/runtimes.py``); the README's table of recipes says the same in short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from workers.machine.files import write_text
from workers.spec.base import Frozen
from workers.spec.job import CHECKED, LOADER_CHECKED

DOCS = Path(__file__).parents[2] / "docs"
HEAD = """# Recipes in runtimes

Printed by `make runtimes` from a run on the zoo's small models; the verdicts are those of `results.json` and of cards:

- **checked**: loaded and computed by the runtime as its users run it, on the processor that is named.
- **loader checked, kernels not**: the runtime has no kernel for that processor. Its own configuration and loader ran,
  every parameter was set, and PyTorch computed with what was loaded.
- **refused**: the plan refuses the pair of recipe and model where `verify.runtimes` names that runtime, for the reason.

Difference: root mean square of the runtime's logits minus those of our decoding, in standard deviations. KL: of the
runtime's predictions from those of our decoding, in nats for each token.
"""


class Outcome(Frozen):
    """One recipe's artifact of one model in one runtime."""

    recipe: str
    model: str
    runtime: str
    verdict: Literal["checked", "loader checked, kernels not", "refused", "failed"]
    version: str = ""
    processor: str = ""
    difference: float | None = Field(None, description="Root mean square, in standard deviations of our logits.")
    kl: float | None = None
    why: str = ""


def read(folder: Path = DOCS) -> tuple[Outcome, ...]:
    """The outcomes that were measured last; none if there is no such file."""
    path = folder / "runtimes.json"
    return TypeAdapter(tuple[Outcome, ...]).validate_json(path.read_text()) if path.is_file() else ()


def write(found: Iterable[Outcome], folder: Path = DOCS) -> None:
    """Write both files, sorted by model, recipe and runtime."""
    rows = sorted(found, key=lambda outcome: (outcome.model, outcome.recipe, outcome.runtime))
    lines = ",\n".join(json.dumps(row.model_dump(exclude_defaults=True)) for row in rows)
    write_text(folder / "runtimes.json", f"[\n{lines}\n]\n")
    write_text(folder / "runtimes.md", page(rows))


def page(rows: Iterable[Outcome]) -> str:
    """docs/runtimes.md."""
    listed = list(rows)
    parts = [HEAD]
    for model in dict.fromkeys(row.model for row in listed):
        parts += [f"\n## {model}\n\n| recipe | runtime | verdict | difference | KL |\n|---|---|---|---|---|\n"]
        parts += [_line(row) for row in listed if row.model == model]
    return "".join(parts)


def _line(row: Outcome) -> str:
    runtime = f"{row.runtime} {row.version}".strip() + (f", {row.processor}" if row.processor else "")
    verdict = f"{row.verdict}: {row.why}" if row.why else row.verdict
    numbers = ("" if value is None else f"{value:.2g}" for value in (row.difference, row.kl))
    return f"| {' | '.join([row.recipe, runtime, verdict, *numbers])} |\n".replace("|  |", "| |").replace("|  |", "| |")


def in_short(found: Iterable[Outcome], recipe: str, runtime: str) -> str:
    """What was seen of a recipe in a runtime, over all models: the verdict of dense ones, and that of mixtures."""
    seen = {row.model: row for row in found if (row.recipe, row.runtime) == (recipe, runtime)}
    loaded = [row for row in seen.values() if row.verdict in (CHECKED, LOADER_CHECKED)]
    if not loaded:
        return ""
    verdicts = {row.verdict for row in loaded}
    if len(verdicts) == 1:
        return next(iter(verdicts))
    return f"{CHECKED}; mixtures: {LOADER_CHECKED}"
