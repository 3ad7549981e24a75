"""Commands for this machine: check it, and build its environments."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from pipeline.cli.options import FAILED, JSON, print_json, print_rows

if TYPE_CHECKING:
    from workers.spec.recipes import Recipe


@click.command()
@click.argument("recipes", nargs=-1)
@click.option("--zoo", type=click.Path(path_type=Path), help="Look at the recipes of this zoo file instead.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where runs would write.")
@click.option("--address", metavar="URL", help="Check the nodes of this running Ray cluster instead.")
@JSON
def doctor(recipes: tuple[str, ...], zoo: Path | None, out: Path, address: str | None, as_json: bool) -> None:
    """Check this machine against RECIPES, all that are shipped if none is named; each in its own environment."""
    from pipeline import doctor
    from workers.machine.preflight import notes

    chosen = doctor.recipes(recipes, zoo)
    if address:
        _nodes(chosen, zoo, out, address, as_json=as_json)
    facts = doctor.facts(sys.executable, out)
    if as_json:
        found = doctor.examine(chosen, facts, out, doctor.runtimes(zoo))
        print_json({"machine": facts.model_dump(mode="json"), "problems": found})
        sys.exit(FAILED if any(found.values()) else 0)
    devices = ", ".join(f"{d.name} ({d.memory / 1e9:.0f} GB)" for d in facts.devices) or "none: the CPU is used"
    click.echo(
        f"{facts.node}: Python {facts.python}, {facts.cpus} cores, {facts.host_memory / 1e9:.1f} GB, GPU: {devices}"
    )
    of_the_zoo = doctor.zoo_problems(zoo, out) if zoo else []
    for problem in of_the_zoo:
        click.echo(f"{zoo}: {problem}")
    click.echo(f"{out}: {facts.disk_free / 1e9:.1f} GB free")
    problems = doctor.examine(chosen, facts, out, doctor.runtimes(zoo))
    rows = [
        {"recipe": r.name, "environment": r.environment or "", "state": _state(problems[r.name], notes(facts, r))}
        for r in chosen
    ]
    columns = ("recipe", "environment", "state") if any(r.environment for r in chosen) else ("recipe", "state")
    print_rows(rows, columns)
    sys.exit(FAILED if of_the_zoo or any(problems.values()) else 0)


def _nodes(chosen: Sequence[Recipe], zoo: Path | None, out: Path, address: str, *, as_json: bool) -> NoReturn:
    """Print on which nodes of a cluster recipes run, and what the others lack."""
    from pipeline import doctor
    from pipeline.fleet import feasibility

    found = feasibility.by_node(chosen, out, address, doctor.runtimes(zoo))
    nowhere = [name for name, nodes in found.items() if all(nodes.values())]
    if as_json:
        print_json({"nodes": found})
    else:
        print_rows([{"recipe": name, "state": _state_on(nodes)} for name, nodes in found.items()], ("recipe", "state"))
    sys.exit(FAILED if nowhere else 0)


def _state_on(nodes: Mapping[str, Sequence[str]]) -> str:
    """Where a recipe runs, and what each other node lacks, nodes of one lack together."""
    if not nodes:
        return "no node answers"
    lacking: dict[tuple[str, ...], list[str]] = {}
    for node, problems in nodes.items():
        lacking.setdefault(tuple(problems), []).append(node)
    ready = lacking.pop((), [])
    said = [f"ready on {', '.join(ready)}"] if ready else []
    return "; ".join([*said, *(f"{', '.join(names)}: {'; '.join(problems)}" for problems, names in lacking.items())])


def _state(problems: Sequence[str], notes: Sequence[str]) -> str:
    return "; ".join(problems) or " but: ".join(["ready", *notes])


@click.group()
def env() -> None:
    """Environments that recipes name for want of the driver's packages."""


@env.command("create")
@click.argument("name")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="YAML: description and packages of an environment of your own.",
)
def env_create(name: str, source: Path | None) -> None:
    """Build the environment NAME on this machine, unless it stands as it's defined."""
    from pipeline import env_builder

    env_builder.create(name, source, click.echo)


@env.command("list")
@JSON
def env_list(as_json: bool) -> None:
    """Show the known environments and those that are built here."""
    from pipeline import env_builder

    if as_json:
        print_json([asdict(row) for row in env_builder.rows()])
        return
    rows = [
        {
            "environment": row.name,
            "state": row.state,
            "size": env_builder.in_words(row.size) if row.size else "",
            "where": row.path,
            "description": row.description,
        }
        for row in env_builder.rows()
    ]
    print_rows(rows, tuple(rows[0]))


@env.command("remove")
@click.argument("name")
def env_remove(name: str) -> None:
    """Delete the environment NAME from this machine."""
    from pipeline import env_builder

    env_builder.remove(name, click.echo)
