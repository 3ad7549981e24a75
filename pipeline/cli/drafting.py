"""Commands for a start without a zoo file: run one that is made of options, or write one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.cli.options import FAILED, OUT

CALIBRATION = click.option(
    "--calibration",
    metavar="TEXT",
    help="What calibrated recipes learn from: a file (.txt, .jsonl, .parquet), or a data set of the Hub as "
    "ORG/NAME[:CONFIG[:SPLIT]]; left out: the project's own text.",
)
HELD_OUT = click.option(
    "--held-out",
    metavar="TEXT",
    help="What artifacts are compared with their source on, in the same form; left out: the project's own text.",
)
TO = click.option(
    "--to", "namespace", metavar="NAMESPACE", help="Publish in this account; left out: stop after verify."
)
ENDPOINT = click.option(
    "--endpoint", metavar="WHERE", help="With --to: a Hub's URL, 'loopback', or a folder; left out: HF_ENDPOINT, or HF."
)


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--recipe", "recipes", metavar="NAME", multiple=True, help="A shipped recipe; more than once for several."
)
@TO
@ENDPOINT
@OUT
@CALIBRATION
@HELD_OUT
@click.option("--save-zoo", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Keep the zoo file.")
@click.option("--address", help="A running Ray cluster; left out: one on this machine, for this run.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan.")
@click.option("--webhook", envvar="QUANTMILL_WEBHOOK", help="URL that is told, as JSON, how the run ended.")
def quantize(
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    namespace: str | None,
    endpoint: str | None,
    out: Path,
    calibration: str | None,
    held_out: str | None,
    save_zoo: Path | None,
    address: str | None,
    dry_run: bool,
    webhook: str | None,
) -> None:
    """Quantize, verify and publish each MODEL (a folder, or org/name) by each recipe, without a zoo file.

    The same run as `quantmill run` makes of a zoo file, with the same results and exit codes.
    """
    from pipeline import session
    from pipeline.cli.runs import Terminal, end, print_plan
    from pipeline.zoo import drafts
    from workers.errors import ZooError

    if endpoint and not namespace:
        raise ZooError(f"--endpoint: got {endpoint!r} without --to; add --to NAMESPACE, or leave --endpoint out")
    draft = drafts.Draft(
        models=models,
        recipes=recipes,
        namespace=namespace,
        endpoint=endpoint,
        calibration=calibration,
        held_out=held_out,
        here=Path.cwd(),
    )
    zoo = drafts.loaded(draft, "quantmill quantize")
    if save_zoo:
        drafts.save(draft, save_zoo)
        click.echo(f"wrote {save_zoo}")
    if own := drafts.on_own_text(draft):
        click.echo(own)
    if dry_run:
        with session.destination(zoo, out, address) as to:
            session.check_endpoint(zoo, to)
            plan = session.make_plan(zoo, Path.cwd() / "zoo.yaml", out, to)
            print_plan(plan, zoo, to)
        sys.exit(FAILED if plan.refused else 0)
    os.environ.pop("QUANTMILL_WEBHOOK", None)  # nothing that a run starts needs it
    end(session.run_loaded(zoo.name, lambda: zoo, Path.cwd(), out, address, webhook, Terminal()))


MEMORY = click.option("--memory", metavar="SIZE", help="Of the machine that it will run on, as 16GiB or 24GB.")


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=Path("zoo.yaml"))
@click.option("--model", "models", metavar="MODEL", multiple=True, help="A folder, or org/name; may be given again.")
@click.option("--recipe", "recipes", metavar="NAME", multiple=True, help="A shipped recipe; may be given again.")
@click.option("--runtime", metavar="NAME", help="What will load it: transformers, vLLM, llama.cpp or mlx-lm.")
@TO
@ENDPOINT
@CALIBRATION
@HELD_OUT
def init(
    path: Path,
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    runtime: str | None,
    namespace: str | None,
    endpoint: str | None,
    calibration: str | None,
    held_out: str | None,
) -> None:
    """Write a first zoo file to PATH; asks in a terminal, and takes options elsewhere. An existing one is left alone."""
    from pipeline.zoo import drafts
    from workers.errors import ZooError

    if path.exists():
        raise ZooError(f"init: {str(path)!r} exists already; name another file")
    draft = drafts.first(
        models=models,
        recipes=recipes,
        runtime=runtime,
        namespace=namespace,
        endpoint=endpoint,
        calibration=calibration,
        held_out=held_out,
        here=Path.cwd(),
    )
    drafts.save(draft, path)
    click.echo(f"wrote {path}, and {drafts.SCHEMA} beside it for editors; then: quantmill plan {path}")
