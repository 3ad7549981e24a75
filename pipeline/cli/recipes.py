"""Commands that help to choose a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import JSON, MEMORY, OUT, RUNTIME, USE, Use, print_json, print_rows

# Recommendations that the table shows, unless all are asked for.
SHOWN = 8
# The zoo's small models whose KL the table shows.
DENSE, MIXTURE = "llama-tiny", "qwen3-moe-tiny"


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
    shown = [
        {
            "recipe": row.name,
            "bits": "" if row.bits is None else f"{row.bits:.3g}{'+' * row.mixed}",
            "KL": _number(row.kl.get(DENSE)),
            "KL, experts": _number(row.kl.get(MIXTURE)),
            "read by": ", ".join(row.runtimes),
            "needs": ", ".join([*(["text"] if row.calibrated else []), *map(_short, row.needs)]),
            "format": row.format,
        }
        for row in rows
    ]
    print_rows(shown, tuple(shown[0]), drop=("format", "KL, experts", "needs", "read by"))
    click.echo(f"KL: measured on {DENSE} and, with experts, on {MIXTURE}; nats a token. text: to calibrate on.")


def _number(kl: float | None) -> str:
    return "" if kl is None else f"{kl:.2g}"


def _short(need: str) -> str:
    """A need in fewer words."""
    return need.replace("environment ", "env ").replace("package ", "")


@click.command()
@click.argument("model")
@MEMORY
@click.option(
    "--gpu", metavar="NAME", help="A card that it will run on, as L4 or 'RTX 4090': its memory, its arithmetic."
)
@RUNTIME
@USE
@click.option(
    "--all", "everything", is_flag=True, help="Show every recipe that can be made of it, also what won't fit."
)
@JSON
@OUT
def recommend(
    model: str,
    memory: str | None,
    gpu: str | None,
    runtime: str | None,
    use: Use,
    everything: bool,
    as_json: bool,
    out: Path,
) -> None:
    """Say which recipes suit MODEL (a folder, or org/name), why, what they take, and what they cost in quality.

    From what runs in --out measured of this model where there is something, else from rules of the field; each line
    says which of the two.
    """
    from pipeline.env_builder import in_words
    from pipeline.planning import choosing

    card = choosing.card(gpu) if gpu else None
    room = choosing.memory_bytes(memory) if memory else card.memory if card else None
    source = choosing.source(model, Path.cwd())
    found = choosing.choose(source, room, runtime, use, choosing.measured_of(model, [out]), card)
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    fitting = found if everything else [one for one in found if one.fits][:SHOWN]
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        click.echo(
            f"nothing fits {memory or gpu}: the smallest, {least.recipe}, takes {in_words(least.bytes)} and a tenth "
            "for the rest; take a smaller model, or more memory"
        )
        return
    shown = [
        {
            "recipe": one.recipe,
            "size": in_words(one.bytes),
            "KL": f"{one.kl_mean:.2g}",
            "known from": one.source,
            "why": one.why,
        }
        for one in fitting
    ]
    print_rows(shown, tuple(shown[0]))
    click.echo(f"make the first: quantmill quantize {model} --recipe {fitting[0].recipe}")
