"""Commands that help to choose a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import JSON, MEMORY, OUT, RUNTIME, USE, Use, print_json, print_rows

# Recommendations that the table shows, unless all are asked for.
SHOWN = 8


@click.command()
@JSON
def recipes(as_json: bool) -> None:
    """List the shipped recipes: bits, format, runtimes, what they need, and what they were measured to cost.

    KL is that of the zoo's small models, which lose more than large ones: good for comparing recipes with each other.
    """
    from pipeline.planning.catalog import catalog

    rows = catalog()
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    models = sorted({model for row in rows for model in row.kl})
    shown = [
        {
            "recipe": row.name,
            "bits": "source's" if row.bits is None else f"{row.bits:.3g}{'+' * row.mixed}",
            "format": row.format,
            "read by": ", ".join(row.runtimes),
            "needs": ", ".join([*(["calibration text"] if row.calibrated else []), *row.needs]),
            **{f"KL {model}": f"{row.kl[model]:.2g}" if model in row.kl else "" for model in models},
        }
        for row in rows
    ]
    print_rows(shown, tuple(shown[0]))


@click.command()
@click.argument("model")
@MEMORY
@RUNTIME
@USE
@click.option(
    "--all", "everything", is_flag=True, help="Show every recipe that can be made of it, also what won't fit."
)
@JSON
@OUT
def recommend(
    model: str, memory: str | None, runtime: str | None, use: Use, everything: bool, as_json: bool, out: Path
) -> None:
    """Say which recipes suit MODEL (a folder, or org/name), why, what they take, and what they cost in quality.

    From what runs in --out measured of this model where there is something, else from rules of the field; each line
    says which of the two.
    """
    from pipeline.planning import choosing

    room = choosing.memory_bytes(memory) if memory else None
    source = choosing.source(model, Path.cwd())
    found = choosing.choose(source, room, runtime, use, choosing.measured_of(model, [out]))
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    fitting = found if everything else [one for one in found if one.fits][:SHOWN]
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        click.echo(
            f"nothing fits {memory}: the smallest, {least.recipe}, takes {least.bytes / 1e9:.3g} GB and a tenth for "
            "the rest; take a smaller model, or more memory"
        )
        return
    shown = [
        {
            "recipe": one.recipe,
            "size": f"{one.bytes / 1e9:.3g} GB",
            "KL": f"{one.kl_mean:.2g}",
            "known from": one.source,
            "why": one.why,
        }
        for one in fitting
    ]
    print_rows(shown, tuple(shown[0]))
    click.echo(f"make the first: quantmill quantize {model} --recipe {fitting[0].recipe}")
