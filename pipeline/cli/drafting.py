"""Commands for a start without a zoo file: run one that is made of options, or write one."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click

from pipeline.cli.options import FAILED, JSON, MEMORY, OUT, QUIET, RUNTIME, USE, Use

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
@QUIET
@JSON
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
    quiet: bool,
    as_json: bool,
) -> None:
    """Quantize, verify and publish each MODEL (a folder, or org/name) by each recipe, without a zoo file.

    The same run as `quantmill run` makes of a zoo file, with the same results and exit codes.
    """
    from pipeline import session
    from pipeline.cli.runs import Terminal, end, show_plan
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
        click.echo(f"wrote {save_zoo}", err=as_json)
    if (own := drafts.on_own_text(draft)) and not quiet:
        click.echo(own, err=as_json)
    if dry_run:
        with session.destination(zoo, out, address) as to:
            session.check_endpoint(zoo, to)
            plan = session.make_plan(zoo, Path.cwd() / "zoo.yaml", out, to)
            show_plan(plan, zoo, to, as_json=as_json)
        sys.exit(FAILED if plan.refused else 0)
    os.environ.pop("QUANTMILL_WEBHOOK", None)  # nothing that a run starts needs it
    screen = Terminal(quiet=quiet or as_json)
    finished = session.run_loaded(zoo.name, lambda: zoo, Path.cwd(), out, address, webhook, screen)
    end(finished, quiet=quiet, as_json=as_json)


MODEL_HELP = "A folder, or org/name; may be given again."


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=Path("zoo.yaml"))
@click.option("--model", "models", metavar="MODEL", multiple=True, help=MODEL_HELP)
@click.option("--recipe", "recipes", metavar="NAME", multiple=True, help="A shipped recipe; left out: chosen for you.")
@RUNTIME
@MEMORY
@USE
@TO
@ENDPOINT
@CALIBRATION
@HELD_OUT
def init(
    path: Path,
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    runtime: str | None,
    memory: str | None,
    use: Use,
    namespace: str | None,
    endpoint: str | None,
    calibration: str | None,
    held_out: str | None,
) -> None:
    """Write a first zoo file to PATH, unless it exists; asks in a terminal, and takes options elsewhere."""
    from pipeline.zoo import drafts
    from workers.errors import ZooError

    if path.exists():
        raise ZooError(f"init: {str(path)!r} exists already; name another file")
    answers = Answers(models, recipes, runtime, memory, use, namespace, endpoint)
    if sys.stdin.isatty() and answers == Answers():
        answers = ask()
    models = answers.models or (drafts.FIRST_MODEL,)
    chosen = choose_recipes(answers, models[0])
    given = bool(answers.models)
    own = all(Path(model).is_dir() for model in models)
    texts = (None, None) if own else drafts.WIKITEXT
    draft = drafts.Draft(
        models=models,
        recipes=chosen,
        name=None if given else "first",
        namespace=answers.namespace,
        endpoint=answers.endpoint,
        calibration=calibration or texts[0],
        held_out=held_out or texts[1],
        runtimes=(answers.runtime,) if answers.runtime else (),
        remarks=drafts.REMARKS,
        here=Path.cwd(),
    )
    drafts.save(draft, path)
    click.echo(f"wrote {path}, and {drafts.SCHEMA} beside it for editors; then: quantmill plan {path}")


@dataclass(frozen=True)
class Answers:
    """What is known of the zoo to write."""

    models: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    runtime: str | None = None
    memory: str | None = None
    use: Use = "inference"
    namespace: str | None = None
    endpoint: str | None = None


def ask() -> Answers:
    """Ask in the terminal for everything; an empty answer takes what stands in brackets."""
    from pipeline.zoo import drafts
    from workers.spec.runtimes import RUNTIMES

    models = click.prompt("Models (folders, or org/name; several with spaces)", default=drafts.FIRST_MODEL).split()
    names = [row.name for row in RUNTIMES.values() if row.entry]
    runtime = click.prompt(
        "What will load them", type=click.Choice([*names, "any"], case_sensitive=False), default="any"
    )
    memory = click.prompt("Memory there, as 16GiB (empty: no matter)", default="", show_default=False)
    use: Use = click.prompt("What for", type=click.Choice(["inference", "qlora", "production"]), default="inference")
    answers = Answers(tuple(models), (), None if runtime == "any" else runtime, memory.strip() or None, use)
    recipes = click.prompt("Recipes (several with spaces)", default=" ".join(choose_recipes(answers, models[0])))
    to = click.prompt("Publish in which account (empty: nowhere)", default="", show_default=False).strip()
    where = ""
    if to:
        where = click.prompt(
            "Where: a Hub's URL, loopback, or a folder (empty: the Hub)", default="", show_default=False
        ).strip()
    return replace(answers, recipes=tuple(recipes.split()), namespace=to or None, endpoint=where or None)


def choose_recipes(answers: Answers, model: str) -> tuple[str, ...]:
    """The recipes that are named, else the best that fit the memory, else the usual ones of the runtime."""
    from pipeline.planning import choosing
    from pipeline.zoo import drafts
    from workers.errors import ModelNotFound, TransientError, ZooError
    from workers.spec.runtimes import TRANSFORMERS

    if answers.recipes:
        return answers.recipes
    memory = choosing.memory_bytes(answers.memory) if answers.memory else None
    if memory is None and answers.use == "inference":
        return drafts.usual(answers.runtime)
    try:
        source = choosing.source(model, Path.cwd())
    except (ModelNotFound, TransientError) as error:
        click.echo(f"recipes are the usual ones, for the size of {model} isn't known: {error}", err=True)
        return drafts.usual(answers.runtime)
    # A runtime that needs no environment of its own, unless another is asked for.
    found = choosing.choose(source, memory, answers.runtime or TRANSFORMERS.name, answers.use, {})
    fitting = [one.recipe for one in found if one.fits]
    if not fitting:
        least = min(one.bytes for one in found)
        raise ZooError(
            f"--memory: got {answers.memory!r}, but the smallest artifact of {model} takes {least / 1e9:.3g} GB and "
            "a tenth for the rest; take a smaller model, or more memory"
        )
    return tuple(fitting[:2])
