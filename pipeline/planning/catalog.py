"""What there is to say of each shipped recipe: from the rows, and measured (``configs/measured.json``)."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, TypeAdapter

from pipeline.planning.recommend import bits_for_each_weight
from pipeline.zoo import shipped
from workers.machine import preflight
from workers.machine.files import write_text
from workers.spec.base import Frozen
from workers.spec.layers import LayerKinds
from workers.spec.recipes import KeepRecipe, Recipe, words
from workers.spec.runtimes import RUNTIMES, checkers, checking

FILE = "measured.json"


class MeasuredRow(Frozen):
    """One artifact of one of the zoo's small models, as ``tests/zoo/measured.py`` wrote it from a run's results."""

    recipe: str
    model: str
    kl_mean: float = Field(description="Nats for each held-out token, against the half-precision source.")
    top1_agreement: float
    bytes: int
    reference_bytes: int
    seconds: float | None = Field(None, description="Of this artifact's own work in the pass; null: not written down.")


class CatalogRow(Frozen):
    """A shipped recipe; the names of its fields are those of ``quantmill recipes --json``."""

    name: str
    method: str
    format: str
    scheme: str
    bits: float | None = Field(description="For each weight of a large matrix, scales included; null: the source's.")
    mixed: bool = Field(description="Whether some layers have more bits.")
    runtimes: tuple[str, ...] = Field(description="That read its artifacts of dense models; the first checks them.")
    calibrated: bool = Field(description="Whether it needs a calibration text.")
    needs: tuple[str, ...] = Field(description="Environments and packages beside quantmill's own.")
    kl: dict[str, float] = Field(description="Measured, by small model of the zoo: nats for each token.")
    description: str


def read() -> tuple[MeasuredRow, ...]:
    """What was measured last of the zoo's small models; none if there is no such file."""
    path = shipped.configs() / FILE
    return TypeAdapter(tuple[MeasuredRow, ...]).validate_json(path.read_text()) if path.is_file() else ()


def write(rows: Iterable[MeasuredRow]) -> None:
    """Write the file that ``read`` reads, sorted by model and recipe."""
    lines = ",\n".join(row.model_dump_json() for row in sorted(rows, key=lambda row: (row.model, row.recipe)))
    write_text(shipped.configs() / FILE, f"[\n{lines}\n]\n")


def measured_table() -> str:
    """Markdown table of what was measured, for docs/choosing.md: least KL first."""
    rows = [row for row in catalog() if row.kl]
    models = sorted({model for row in rows for model in row.kl})
    lines = [("recipe", "bits", "format", *(f"KL {model}" for model in models)), ("---",) * (3 + len(models))]
    for row in sorted(rows, key=lambda row: next(row.kl[model] for model in models if model in row.kl)):
        numbers = (f"{row.kl[model]:.2g}" if model in row.kl else "not measured" for model in models)
        lines.append((f"`{row.name}`", f"{row.bits:.3g}{'+' * row.mixed}", row.format, *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timed_table(model: str = "llama-tiny") -> str:
    """Markdown table of one model's recipes with what each took, for docs/methods.md: by method, least KL first."""
    rows = {row.name: row for row in catalog()}
    timed = [row for row in read() if row.model == model and row.seconds is not None and row.recipe in rows]
    lines = [("recipe", "method", "bits", "KL", "top-1", "MB", "seconds"), ("---",) * 7]
    for row in sorted(timed, key=lambda row: (rows[row.recipe].method, row.kl_mean)):
        shown = rows[row.recipe]
        bits = f"{shown.bits:.3g}{'+' * shown.mixed}"
        numbers = (f"{row.kl_mean:.2g}", f"{row.top1_agreement:.3f}", f"{row.bytes / 1e6:.1f}", f"{row.seconds:.2g}")
        lines.append((f"`{row.recipe}`", shown.method, bits, *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def catalog() -> list[CatalogRow]:
    """All shipped recipes, by name."""
    measured = read()
    return [_row(shipped.recipe(name), measured) for name in shipped.recipe_names()]


def _row(recipe: Recipe, measured: Iterable[MeasuredRow]) -> CatalogRow:
    return CatalogRow(
        name=recipe.name,
        method=recipe.method,
        format=recipe.format,
        scheme=words(recipe),
        bits=None if isinstance(recipe, KeepRecipe) else round(bits_for_each_weight(recipe.scheme, recipe.format), 2),
        mixed=bool(getattr(recipe, "overrides", ())),
        runtimes=tuple(_readers(recipe)),
        calibrated=recipe.calibrated,
        needs=tuple(_needs(recipe)),
        kl={row.model: row.kl_mean for row in measured if row.recipe == recipe.name},
        description=recipe.description,
    )


def _readers(recipe: Recipe) -> list[str]:
    """Names of the runtimes that read a recipe's artifacts of dense models; the one that checks them first."""
    kinds = LayerKinds(mixed=bool(getattr(recipe, "overrides", ())))
    first = checking(recipe.format).name
    others = [
        row.name
        for row in RUNTIMES.values()
        if recipe.format in row.rules and row.reads(recipe.format, recipe.scheme, kinds) is None
    ]
    return [first, *(name for name in others if name != first)]


def _needs(recipe: Recipe) -> list[str]:
    """Prebuilt environments and extra packages, in words."""
    environments = [f"environment {name}" for name in preflight.environments_of(recipe)]
    reader = checkers(recipe.format)[0]
    packages = () if reader.environment else reader.packages.get(recipe.format, ())
    return [*environments, *(f"package {name}" for name in packages if name in reader.extras)]
