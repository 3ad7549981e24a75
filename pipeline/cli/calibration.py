"""Commands about what models are calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import JSON, ZOO, print_json, print_rows


@click.group()
def calibration() -> None:
    """What models are calibrated on: shipped sets of data, and how a model sees them."""


@calibration.command("list")
@JSON
def list_sets(as_json: bool) -> None:
    """List the sets of calibration data that a zoo can name as `calibration: NAME`."""
    from pipeline.zoo import shipped

    rows = [
        {
            "set": name,
            "data sets": ", ".join(dataset.called for dataset in shipped.calibration_set(name).mixture),
            "what": shipped.calibration_set(name).description,
        }
        for name in shipped.calibration_sets()
    ]
    if as_json:
        print_json(rows)
        return
    print_rows(rows, ("set", "what", "data sets"), drop=("data sets",))
    click.echo(f"A zoo that names none, though a recipe needs one, is calibrated on {shipped.DEFAULT_SET}.")


@calibration.command()
@click.argument("name")
@ZOO
@click.option("--model", metavar="ID", help="A model of the zoo; left out: the first.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True, help="Of each data set.")
@click.option("--tokens", type=click.IntRange(8), help="Tokens of a sequence; left out: as the zoo says.")
@JSON
def show(name: str, zoo: Path, model: str | None, sequences: int, tokens: int | None, as_json: bool) -> None:
    """Print the first sequences of the set NAME, or of ZOO's own calibration (`zoo`), as a model of ZOO sees them.

    Special tokens are marked: reversed in a terminal, and put into ⟦ ⟧.
    """
    from pipeline.sampling import sample

    used, shown = sample(name, zoo, model, sequences, tokens)
    if as_json:
        print_json({"calibrated on": used.described, "sequences": shown})
        return
    click.echo(f"calibrated on {used.described}")
    for one in shown:
        click.echo(f"\n--- {one['dataset']}, {one['tokens']} tokens\n{''.join(map(_marked, one['pieces']))}")


def _marked(piece: dict[str, Any]) -> str:
    from workers.spec.bounds import printable_lines

    text = printable_lines(piece["text"])
    return click.style(f"⟦{text}⟧", reverse=True) if piece["special"] else text
