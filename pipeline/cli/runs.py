"""Commands for zoo files and their runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from pipeline.cli.options import FAILED, JSON, OUT, QUIET, STRICT, WRONG, ZOO, print_json, print_rows
from pipeline.cli.submitted import print_submitted

# Models whose best artifact a run's end names.
SHOWN = 3

if TYPE_CHECKING:
    from pipeline.ending import Finished
    from pipeline.planning.plan import Plan
    from pipeline.report.progress import LiveProgress, PlainProgress
    from pipeline.report.results import Results
    from pipeline.zoo.zoo import Zoo


@click.command()
@ZOO
@OUT
@click.option("--address", help="A running Ray cluster; left out: one on this machine, for this run.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan.")
@STRICT
@click.option("--webhook", envvar="QUANTMILL_WEBHOOK", help="URL that is told, as JSON, how the run ended.")
@QUIET
@JSON
def run(
    zoo: Path,
    out: Path,
    address: str | None,
    dry_run: bool,
    strict: bool,
    webhook: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make, verify and publish what the zoo file ZOO asks for and doesn't stand there yet."""
    from pipeline import session
    from pipeline.planning.automatic import load

    if dry_run:
        loaded = load(zoo, out)
        with session.destination(loaded, out, address) as endpoint:
            session.check_endpoint(loaded, endpoint)
            planned = session.make_plan(loaded, zoo, out, endpoint, strict=strict)
            show_plan(planned, loaded, endpoint, as_json=as_json)
        sys.exit(FAILED if planned.refused else 0)
    os.environ.pop("QUANTMILL_WEBHOOK", None)  # nothing that a run starts needs it
    screen = Terminal(quiet=quiet or as_json)
    end(session.run_zoo(zoo, out, address, webhook, screen, strict=strict), quiet=quiet, as_json=as_json)


def end(finished: Finished, *, quiet: bool = False, as_json: bool = False) -> NoReturn:
    """Print what a run came to, and exit with its code.

    ``quiet``: what wasn't accepted, and where the results are. ``as_json``: the results alone.
    """
    with suppress(OSError):  # a terminal that is gone
        if as_json:
            click.echo(finished.results.model_dump_json(indent=1))
        else:
            _print_results(finished, quiet)
        _leave(finished)
    sys.exit(finished.exit_code)


@click.command()
@ZOO
@OUT
@click.option("--address", help="A running Ray cluster to judge by; left out: this machine.")
@STRICT
@JSON
@click.option(
    "--modules", is_flag=True, help="Also list each model's modules under each recipe, and what stays as it is."
)
def plan(zoo: Path, out: Path, address: str | None, strict: bool, as_json: bool, modules: bool) -> None:
    """Show what would be made, what is skipped and why, with sizes and memory, and what fits on no node."""
    from pipeline import session
    from pipeline.fleet import feasibility
    from pipeline.planning.automatic import load

    loaded = load(zoo, out)
    with session.destination(loaded, out) as endpoint:
        session.check_endpoint(loaded, endpoint)
        planned = session.make_plan(loaded, zoo, out, endpoint, strict=strict)
        if not as_json:
            print_plan(planned, loaded, endpoint)
            if modules:
                _print_modules(planned)
        lines = feasibility.infeasible(planned, out, address)
        if as_json:
            show_plan(planned, loaded, endpoint, as_json=True, infeasible=lines)
    for line in [] if as_json else lines:
        click.echo(line)
    if lines or planned.refused:
        sys.exit(FAILED)


@click.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@OUT
@click.option("--address", metavar="URL", help="Show the runs submitted to this cluster instead, or the one named RUN.")
@click.option("--watch", is_flag=True, help="Follow RUN, the newest if none is named, until it ends: a line a stage.")
@JSON
def status(run_id: str | None, out: Path, address: str | None, watch: bool, as_json: bool) -> None:
    """Show the runs of the ledger, or the stages that RUN tried."""
    from pipeline import watching
    from pipeline.ending import at_work
    from pipeline.report.ledger import DIED, Ledger
    from workers.errors import ZooError
    from workers.spec.bounds import printable_lines

    if watch and (address or as_json):
        other = "--address" if address else "--json"
        raise click.UsageError(f"--watch prints lines of a run on this machine, and can't be given with {other}")
    if address:
        print_submitted(address, run_id, as_json=as_json)
        return
    if not (out / "ledger.sqlite").is_file():
        raise ZooError(f"--out: no ledger in {str(out)!r}; run a zoo first, or name the --out of its run")
    if watch:
        for line in watching.watch(out, run_id or watching.newest(out)):
            click.echo(printable_lines(line))
        return
    with Ledger(out) as ledger:
        rows = [dict(row) for row in (ledger.attempts(run_id) if run_id else ledger.runs())]
        known = [str(row["run_id"]) for row in ledger.runs()]
    if not run_id:
        # Whoever holds the lock has recorded the others as dead.
        unfinished = "running" if at_work(out) else DIED
        rows = [{**row, "status": row["status"] or unfinished} for row in rows]
    if run_id and not rows:
        watching.require_known(run_id, known)
    if as_json:
        print_json(rows)
        return
    if run_id and not rows:
        raise ZooError(f"status: the ledger knows no stages of run {run_id!r}; `quantmill status` lists the runs")
    columns = ("model", "recipe", "stage", "attempt", "node", "seconds", "outcome", "error") if run_id else ()
    print_rows(rows, columns or ("run_id", "zoo", "started_at", "finished_at", "status"))


@click.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@OUT
@click.option("--compare", metavar="RUN", help="Print what is otherwise in this run than in that one.")
@click.option("--history", is_flag=True, help="Print how the runs of the same zoo went, the oldest first.")
@JSON
def report(run_id: str | None, out: Path, compare: str | None, history: bool, as_json: bool) -> None:
    """Render report.html of RUN again, of the newest run if none is named."""
    from pipeline import session

    folder = session.find_run(out.resolve(), run_id)
    if compare is None and not history:
        click.echo(session.write_report(folder))
    elif compare is not None:
        _compare(session.results_of(session.find_run(out.resolve(), compare)), session.results_of(folder), as_json)
    else:
        _history(folder, as_json)


def _compare(before: Results, now: Results, as_json: bool) -> None:
    from pipeline.report.night import compared

    changes = compared(before, now)
    if as_json:
        print_json({change.kind: list(change.artifacts) for change in changes})
        return
    click.echo(f"{now.run_id}, compared with {before.run_id}")
    for change in changes:
        click.echo(f"{change.kind}: {len(change.artifacts)}")
        click.echo("".join(f"  {one}\n" for one in change.artifacts), nl=False)
    if not changes:
        click.echo("nothing is otherwise")


def _history(folder: Path, as_json: bool) -> None:
    from pipeline import session
    from pipeline.report.night import about

    rows = [asdict(row) for row in about(session.results_of(folder), folder).history]
    if as_json:
        print_json(rows)
        return
    shown = [
        {
            "run": row["run_id"],
            "status": row["status"],
            "made": row["made"],
            "there already": row["skipped"],
            "failed or rejected": row["bad"],
            "hours": f"{row['hours']:.2f}",
            "median KL": "" if row["kl_median"] is None else f"{row['kl_median']:.3g}",
        }
        for row in rows
    ]
    print_rows(shown, tuple(shown[0]), drop=("there already", "median KL"))


@click.command()
def schema() -> None:
    """Print the JSON Schema of a zoo file, for editors."""
    from pipeline.zoo import reference

    click.echo(json.dumps(reference.schema(), indent=1))


class Terminal:
    """The terminal as a run's ``Screen``: a live table, plain lines where output goes elsewhere, or nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def planned(self, plan: Plan, zoo: Zoo, endpoint: str | None) -> None:
        """See ``Screen``."""
        if not self._quiet:
            print_plan(plan, zoo, endpoint)

    def progress(self, plan: Plan) -> LiveProgress | PlainProgress:
        """See ``Screen``."""
        from rich.console import Console

        from pipeline.report.progress import LiveProgress, PlainProgress

        console = Console(quiet=self._quiet)
        if self._quiet:
            return PlainProgress(console, plan)
        return LiveProgress(console, plan) if console.is_terminal else PlainProgress(console, plan)


def show_plan(plan: Plan, zoo: Zoo, endpoint: str | None, *, as_json: bool, infeasible: Sequence[str] = ()) -> None:
    """Print a plan, as a table or as JSON; ``infeasible`` says what no node has room for."""
    if not as_json:
        print_plan(plan, zoo, endpoint)
        return
    cells = [
        {
            "model": cell.source.pin.id,
            "revision": cell.source.pin.revision,
            "recipe": cell.order.recipe.name,
            "fingerprint": cell.order.fingerprint,
            "plan": cell.reason,
            "repo_id": cell.order.repo_id,
            "source_bytes": cell.estimate.source_bytes,
            "artifact_bytes": cell.estimate.artifact_bytes,
            "host_bytes": cell.estimate.host_bytes,
            "device_bytes": cell.estimate.device_bytes,
        }
        for cell in plan.artifacts
    ]
    refused = [{"model": one.model, "recipe": one.recipe, "reason": one.failure.message} for one in plan.refused]
    print_json(
        {
            "zoo": zoo.name,
            "endpoint": endpoint,
            "artifacts": cells,
            "refused": refused,
            "infeasible": list(infeasible),
            "calibration": plan.calibration.described if plan.calibration else None,
            "notes": list(plan.notes),
        }
    )


def print_plan(plan: Plan, zoo: Zoo, endpoint: str | None) -> None:
    to_make = sum(len(job.orders) for job in plan.jobs)
    where = f"published at {endpoint}" if endpoint else "not published: the zoo has no 'publish'"
    fail = f", {len(plan.refused)} that can't be made" if plan.refused else ""
    artifacts = len(plan.artifacts) + len(plan.refused)
    click.echo(f"zoo {zoo.name}: {artifacts} artifacts, {to_make} to make{fail}; {where}")
    for message, cells in _by_message(plan).items():
        click.echo(f"can't be made: {cells}: {message}")
    if plan.calibration and any(cell.order.recipe.calibrated for cell in plan.artifacts):
        click.echo(f"calibrated on {plan.calibration.described}")
    for note in plan.notes:
        click.echo(f"note: {note}")
    rows = [
        {
            "model": cell.source.name,
            "commit": cell.source.pin.revision[:12],
            "recipe": cell.order.recipe.name,
            "fingerprint": cell.order.fingerprint[:12],
            "plan": cell.reason,
            "source": f"{cell.estimate.source_bytes / 1e6:.1f} MB",
            "artifact": f"{cell.estimate.artifact_bytes / 1e6:.1f} MB",
            "host memory": f"{cell.estimate.host_bytes / 1e9:.1f} GB",
            "on a GPU": f"{cell.estimate.device_bytes / 1e9:.1f} GB",
        }
        for cell in plan.artifacts
    ]
    if rows:
        print_rows(rows, tuple(rows[0]), drop=("commit", "on a GPU", "fingerprint", "host memory"))


def _print_modules(plan: Plan) -> None:
    """What every recipe does to every matrix of every model."""
    from pipeline.planning.modules import modules_of

    for cell in plan.artifacts:
        click.echo(f"\n{cell.source.name} {cell.order.recipe.name}:")
        if not cell.source.tensors:
            click.echo("its weights are pickles, whose names can't be read beforehand")
            continue
        rows = [
            {
                "modules": row.name,
                "how many": str(row.count),
                "outputs x inputs": f"{row.shape_OI[0]} x {row.shape_OI[1]}",
                "becomes": row.scheme or "stays",
                "because of": row.why,
            }
            for row in modules_of(cell.source, cell.order.recipe)
        ]
        print_rows(rows, tuple(rows[0]))


def _by_message(plan: Plan) -> dict[str, str]:
    """The refused cells by their reason: a model's recipes together."""
    cells: dict[str, list[str]] = {}
    for refused in plan.refused:
        cells.setdefault(refused.failure.message, []).append(f"{refused.name} {refused.recipe}")
    return {
        message: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for message, names in cells.items()
    }


def _print_results(finished: Finished, quiet: bool) -> None:
    rows = []
    for entry in () if quiet else finished.results.artifacts:
        metrics = entry.metrics
        rows.append(
            {
                "model": Path(entry.model).name,
                "recipe": entry.recipe,
                "status": entry.status,
                "KL": f"{metrics.kl_mean:.3g}" if metrics else "",
                "top-1": f"{metrics.top1_agreement:.3f}" if metrics else "",
                "perplexity": f"{metrics.perplexity:.3f}" if metrics else "",
                "size": f"{entry.bytes / 1e6:.1f} MB" if entry.bytes else "",
                "published as": entry.repo_id if entry.commit else "",
            }
        )
    if rows:
        print_rows(rows, tuple(rows[0]), drop=("perplexity", "top-1", "published as"))
    for entry in finished.results.artifacts:
        if entry.status in ("rejected", "failed"):
            click.echo(f"{entry.status}: {Path(entry.model).name} {entry.recipe}: {entry.reason}")
    if not quiet:
        _say_what_it_came_to(finished.results)
    for notice in finished.notices:
        click.echo(notice, err=True)
    if finished.exit_code == WRONG and finished.results.error:
        click.echo(f"quantmill: {finished.results.error.message}", err=True)
    if finished.interrupted:
        click.echo("interrupted; run the same command again to go on")
    if finished.results_path:
        click.echo(finished.results_path)
        click.echo(finished.report_path)


def _say_what_it_came_to(results: Results) -> None:
    """The recommended artifact of the first models, and how to talk to one."""
    from pipeline.report.night import recommended
    from pipeline.report.render import MOST_LOST

    models = dict.fromkeys(entry.model for entry in results.artifacts)
    best = [recommended([one for one in results.artifacts if one.model == model], MOST_LOST) for model in models]
    for one in [one for one in best if one and one.metrics][:SHOWN]:
        assert one.metrics is not None
        kept = f"{one.bytes / 1e6:.1f} of {one.reference_bytes / 1e6:.1f} MB, " if one.reference_bytes else ""
        click.echo(f"best of {Path(one.model).name}: {one.recipe} ({kept}KL {one.metrics.kl_mean:.2g} nats a token)")
    here = next((one for one in best if one and one.path and Path(one.path).is_dir()), None)
    if here is not None:
        click.echo(f"talk to it: quantmill chat {shlex.quote(here.path or '')}")


def _leave(finished: Finished) -> None:
    """End the process at once if threads of a stopped plan are left, which may wait for a Hub for minutes."""
    from pipeline.planning.cells import PLANNING

    if any(thread.name.startswith(PLANNING) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(finished.exit_code)
