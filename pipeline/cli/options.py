"""Exit codes, arguments and table printing that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import click

WRONG, FAILED, INTERRUPTED = 2, 1, 130
LOST = 75  # EX_TEMPFAIL: the state of a submitted run is unknown; try again
ZOO = click.argument("zoo", type=click.Path(path_type=Path))
OUT = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="The folder of artifacts, results and ledger.",
)
STRICT = click.option("--strict", is_flag=True, help="Refuse the whole zoo if one of its models can't be made.")
ADDRESS = click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The dashboard of the cluster's head, such as http://head:8265.",
)
Use = Literal["inference", "qlora", "production"]
RUNTIME = click.option("--runtime", metavar="NAME", help="What will load it: transformers, vLLM, llama.cpp or mlx-lm.")
MEMORY = click.option("--memory", metavar="SIZE", help="Of the card or machine that it will run on, as 16GiB or 24GB.")
USE = click.option(
    "--use",
    type=click.Choice(["inference", "qlora", "production"]),
    default="inference",
    show_default=True,
    help="inference: the least loss that fits; qlora: adapters are trained on it; production: eight bits.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print failures, and where the results are, alone.")


def print_json(value: object) -> None:
    """Print a value as JSON; what isn't a number is null."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def print_rows(rows: Sequence[Mapping[str, object]], columns: tuple[str, ...], drop: tuple[str, ...] = ()) -> None:
    """Print a table; in a terminal that is too narrow without those columns of ``drop``, one after another."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from workers.spec.bounds import printable_lines

    texts = [{column: _plain(row[column]) for column in columns} for row in rows]
    # Without a terminal the width is fixed, so that lines in logs and pipes aren't wrapped.
    console = Console(width=None if sys.stdout.isatty() else 180)
    shown = that_fit(texts, columns, drop, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        table.add_column(column, overflow="fold", no_wrap=column in ("model", "recipe", "status", "plan"))
    for row in texts:
        table.add_row(*(Text(printable_lines(row[column])) for column in shown))
    console.print(table)


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def that_fit(
    rows: Sequence[Mapping[str, str]], columns: tuple[str, ...], drop: tuple[str, ...], width: int
) -> list[str]:
    """The columns of a table that isn't wider than ``width``, as far as columns may be dropped."""
    widths = {column: max([len(column), *(len(row[column]) for row in rows)]) for column in columns}
    shown = list(columns)
    for column in drop:
        if sum(widths[name] for name in shown) + 2 * (len(shown) - 1) <= width:
            break
        shown.remove(column)
    return shown
