"""The command line. Imports what a command needs when it runs: ``--help`` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import click

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.ray_jobs import Head
    from pipeline.session import Finished
    from pipeline.zoo import Zoo

WRONG, FAILED, INTERRUPTED = 2, 1, 130
LOST = 75  # EX_TEMPFAIL: what became of a submitted run isn't known; to be tried again

ZOO = click.argument("zoo", type=click.Path(path_type=Path))
OUT = click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True)

ADDRESS = click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The dashboard of the cluster's head, such as http://head:8265.",
)


class _Group(click.Group):
    """Turns the package's own errors into a message and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        from workers.errors import QuantmillError

        try:
            return super().invoke(ctx)
        except QuantmillError as error:
            click.echo(f"quantmill: {type(error).__name__}: {error}", err=True)
            ctx.exit(WRONG)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantmill")
def main() -> None:
    """From a zoo file (models x recipes) to verified, published quantized checkpoints."""


@main.command()
@ZOO
@OUT
@click.option("--address", help="A running Ray cluster; left out: one on this machine, for this run.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan.")
@click.option("--webhook", envvar="QUANTMILL_WEBHOOK", help="URL that is told, as JSON, how the run ended.")
def run(zoo: Path, out: Path, address: str | None, dry_run: bool, webhook: str | None) -> None:
    """Make, verify and publish what the zoo file ZOO asks for and doesn't stand there yet."""
    from pipeline import notify, session
    from pipeline import zoo as zoos

    loaded = zoos.load(zoo)
    with session.destination(loaded, out, address) as endpoint:
        plan = session.make_plan(loaded, zoo, out, endpoint)
        _print_plan(plan, loaded, endpoint)
        if dry_run:
            return
        finished = _run(plan, out, address)
    _print_results(finished)
    if webhook and (problem := notify.post(webhook, notify.message(finished.results, finished.results_path))):
        click.echo(problem, err=True)
    if finished.interrupted:
        sys.exit(INTERRUPTED)
    sys.exit(0 if finished.results.status == "ok" else FAILED)


@main.command()
@ZOO
@OUT
@click.option("--address", help="A running Ray cluster to judge by; left out: this machine.")
def plan(zoo: Path, out: Path, address: str | None) -> None:
    """Show what would be made, what is skipped and why, with sizes and memory, and what fits on no node."""
    from pipeline import feasibility, session
    from pipeline import zoo as zoos

    loaded = zoos.load(zoo)
    with session.destination(loaded, out) as endpoint:
        made = session.make_plan(loaded, zoo, out, endpoint)
        _print_plan(made, loaded, endpoint)
        lines = feasibility.infeasible(made, out, address)
    for line in lines:
        click.echo(line)
    if lines:
        sys.exit(FAILED)


@main.command()
@ZOO
@ADDRESS
@click.option("--out", metavar="FOLDER", default="~/quantmill-runs", show_default=True, help="On the cluster, shared.")
@click.option("--follow", is_flag=True, help="Print what the run prints, and end with its exit code.")
@click.option(
    "--shared",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FOLDER",
    help="Every node sees this folder at this path: what the zoo names in it isn't shipped.",
)
@click.option("--python", default="python", show_default=True, help="On the head: the Python that has Ray.")
def submit(zoo: Path, address: str, out: str, follow: bool, shared: tuple[Path, ...], python: str) -> None:
    """Run the zoo file ZOO as a Ray job: code, zoo and the files it names are shipped; once, however often submitted.

    Tokens are not: HF_TOKEN has to be set where Ray was started on the cluster's nodes.
    """
    from pipeline import parcel, submit
    from pipeline import zoo as zoos
    from pipeline.ray_jobs import Head
    from workers.errors import TransientError

    loaded = zoos.load(zoo)
    submit.check(loaded, out)
    packed = parcel.pack(loaded, zoo, shared)
    head = Head(address)
    head.check()
    try:
        there = submit.submit(head, loaded, packed, out, python)
    except TransientError as error:
        click.echo(f"quantmill: {error}", err=True)
        sys.exit(LOST)
    if there.attached:
        click.echo(f"{there.name} is at work already; nothing new was started")
    else:
        click.echo(f"submitted {there.name} ({packed.bytes / 1e6:.1f} MB)")
    if follow:
        _follow(head, there.name)
    click.echo(f"follow it: quantmill logs {there.name} --address {head.address} --follow")
    click.echo(f"cancel it: quantmill cancel {there.name} --address {head.address}")


@main.command()
@click.argument("submitted", metavar="ID")
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the run has ended, and end with its exit code.")
def logs(submitted: str, address: str, follow: bool) -> None:
    """Print what the submitted run ID has printed."""
    from pipeline import submit
    from pipeline.ray_jobs import Head

    head = Head(address)
    head.check()
    submit.find(head, submitted)
    if follow:
        _follow(head, submitted)
    click.echo(head.logs(submitted), nl=False)


@main.command()
@click.argument("submitted", metavar="ID")
@ADDRESS
def cancel(submitted: str, address: str) -> None:
    """End the submitted run ID in order: what it was at is given up, results.json and the report are written."""
    from pipeline import submit
    from pipeline.ray_jobs import Head
    from workers.errors import TransientError

    head = Head(address)
    head.check()
    try:
        click.echo(submit.ending(submit.cancel(head, submitted)))
    except TransientError as error:
        click.echo(f"quantmill: {error}", err=True)
        sys.exit(LOST)


@main.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@OUT
@click.option("--address", metavar="URL", help="Show the runs submitted to this cluster instead, or the one named RUN.")
def status(run_id: str | None, out: Path, address: str | None) -> None:
    """Show the runs of the ledger, or the stages that RUN tried."""
    from pipeline.ledger import Ledger
    from workers.errors import ZooError

    if address:
        _print_submitted(address, run_id)
        return
    if not (out / "ledger.sqlite").is_file():
        raise ZooError(f"--out: no ledger in {str(out)!r}; run a zoo first, or name the --out of its run")
    with Ledger(out) as ledger:
        rows = ledger.attempts(run_id) if run_id else ledger.runs()
    if run_id and not rows:
        raise ZooError(f"status: the ledger knows no stages of run {run_id!r}; `quantmill status` lists the runs")
    columns = ("model", "recipe", "stage", "attempt", "node", "seconds", "outcome", "error") if run_id else ()
    _print_rows([dict(row) for row in rows], columns or ("run_id", "zoo", "started_at", "finished_at", "status"))


@main.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@OUT
def report(run_id: str | None, out: Path) -> None:
    """Render report.html of RUN again, of the newest run if none is named."""
    from pipeline import session

    click.echo(session.write_report(session.find_run(out.resolve(), run_id)))


@main.command()
@click.argument("recipes", nargs=-1)
@click.option("--zoo", type=click.Path(path_type=Path), help="Look at the recipes of this zoo file instead.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where runs would write.")
def doctor(recipes: tuple[str, ...], zoo: Path | None, out: Path) -> None:
    """Check this machine against RECIPES, all that are shipped if none is named; each in its own environment."""
    from pipeline import doctor

    chosen = doctor.recipes(recipes, zoo)
    facts = doctor.facts(sys.executable, out)
    devices = ", ".join(f"{d.name} ({d.memory / 1e9:.0f} GB)" for d in facts.devices) or "none: the CPU is used"
    click.echo(
        f"{facts.node}: Python {facts.python}, {facts.cpus} cores, {facts.host_memory / 1e9:.1f} GB, GPU: {devices}"
    )
    found = doctor.examine(chosen, facts, out)
    rows = [
        {"recipe": r.name, "environment": r.environment or "", "state": "; ".join(found[r.name]) or "ready"}
        for r in chosen
    ]
    shown = ("recipe", "environment", "state") if any(r.environment for r in chosen) else ("recipe", "state")
    _print_rows(rows, shown)
    sys.exit(FAILED if any(found.values()) else 0)


@main.group()
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
    from pipeline import environments

    environments.create(name, source, click.echo)


@env.command("list")
def env_list() -> None:
    """Show the known environments and those that are built here."""
    from pipeline import environments

    rows = [
        {
            "environment": row.name,
            "state": row.state,
            "size": environments.in_words(row.size) if row.size else "",
            "where": row.place,
            "description": row.description,
        }
        for row in environments.rows()
    ]
    _print_rows(rows, tuple(rows[0]))


@env.command("remove")
@click.argument("name")
def env_remove(name: str) -> None:
    """Delete the environment NAME from this machine."""
    from pipeline import environments

    environments.remove(name, click.echo)


@main.command()
@click.option("--root", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the files lie.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
def hub(root: Path, port: int) -> None:
    """Serve the loopback Hub, alone, until Ctrl+C."""
    from pipeline.loopback import serve

    serve(root, port)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--to", "repo_id", required=True, metavar="NAMESPACE/NAME", help="The repository to publish to.")
@click.option(
    "--endpoint", help="URL of a Hub, or a folder: a path, file:///..., s3://...; left out: HF_ENDPOINT, or HF."
)
@click.option("--private/--public", default=True, show_default=True, help="Of a repository that is made.")
@click.option("--gated", type=click.Choice(["auto", "manual"]), help="Access on request, given at once or by you.")
@click.option("--keep", type=click.IntRange(1), help="Revisions whose tags stay; left out: all.")
@click.option("--force", is_flag=True, help="Overwrite what somebody else changed there.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, deleted and tagged; write nothing.")
def publish(
    artifact: Path,
    repo_id: str,
    endpoint: str | None,
    private: bool,
    gated: Literal["auto", "manual"] | None,
    keep: int | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Publish the verified artifact in the folder ARTIFACT: one commit, then its tags."""
    from pipeline import publishing
    from workers.spec.job import Destination

    place = publishing.place(endpoint)
    to = Destination(endpoint=place, private=private, gated=gated or False, keep=keep, force=force)
    for line in publishing.publish(artifact, repo_id, to, dry_run=dry_run):
        click.echo(line)


@main.command()
@click.argument("checkpoint")
@click.option(
    "--reference", required=True, metavar="MODEL", help="What it was made of: a folder, or org/name[@commit]."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text to compare on, that it wasn't calibrated on; left out: WikiText-2's test split, from the Hub.",
)
@click.option("--tokens", type=click.IntRange(256), default=16384, show_default=True)
@click.option("--sequence-length", type=click.IntRange(8), default=512, show_default=True)
@click.option(
    "--gates",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML: thresholds that differ from configs/gates.yaml, by family (w4, nf4, ...).",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--allow-pickle", is_flag=True, help="Read the reference's pickle weights, for want of others.")
@click.option("--task", "tasks", multiple=True, help="Also run this task of lm-eval on both (extra 'eval').")
@click.option(
    "--tasks",
    "task_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with lm-eval tasks of your own.",
)
@click.option("--limit", type=click.IntRange(1), help="Samples of each task; left out: all.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@OUT
def verify(
    checkpoint: str,
    reference: str,
    text: Path | None,
    tokens: int,
    sequence_length: int,
    gates: Path | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    tasks: tuple[str, ...],
    task_folder: Path | None,
    limit: int | None,
    as_json: bool,
    out: Path,
) -> None:
    """Verify CHECKPOINT (a folder, or org/name[@commit]), whichever tool made it, beside the model it was made of."""
    from pipeline import checking

    asked = checking.Asked(
        checkpoint=checkpoint,
        reference=reference,
        text=text,
        tokens=tokens,
        sequence_length=sequence_length,
        gates=gates,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        tasks=tasks,
        task_folder=task_folder,
        limit=limit,
    )
    report, thresholds, family = checking.check(asked, out)
    verdict = report["verdict"]
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print_rows(checking.rows(report, thresholds), ("", "what", "found", "expected"))
        if tasks:
            _print_rows(checking.score_rows(report), ("task", "metric", "reference", "checkpoint"))
        for line in checking.remarks(report):
            click.echo(line)
        click.echo(f"{verdict['outcome']} by the gates of {family}: {checkpoint}")
    sys.exit(0 if verdict["accepted"] else FAILED)


@main.command()
def schema() -> None:
    """Print the JSON Schema of a zoo file, for editors."""
    from pipeline.zoo import Zoo

    click.echo(json.dumps(Zoo.model_json_schema(), indent=1))


@main.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("zoo.yaml"))
def init(path: Path) -> None:
    """Write a first zoo file to PATH; an existing one is left alone."""
    from pipeline import shipped
    from workers.errors import ZooError

    if path.exists():
        raise ZooError(f"init: {str(path)!r} exists already; name another file")
    path.write_text((shipped.configs() / "first.yaml").read_text())
    click.echo(f"wrote {path}; edit it, then: quantmill plan {path}")


def _follow(head: Head, submitted: str) -> NoReturn:
    """Print what a submitted run prints until it has ended, and end with its exit code."""
    from pipeline import submit
    from workers.errors import TransientError

    def tell(what: str) -> None:
        click.echo(f"quantmill: {what}", err=True)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = submit.follow(head, submitted, write, tell)
    except TransientError as error:
        tell(str(error))
        tell(f"follow it again: quantmill logs {submitted} --address {head.address} --follow")
        sys.exit(LOST)
    except KeyboardInterrupt:
        tell(f"{submitted} goes on; follow it again: quantmill logs {submitted} --address {head.address} --follow")
        tell(f"or cancel it: quantmill cancel {submitted} --address {head.address}")
        sys.exit(INTERRUPTED)
    click.echo(submit.ending(job))
    sys.exit(submit.exit_code(job))


def _print_submitted(address: str, submitted: str | None) -> None:
    from pipeline import submit
    from pipeline.ray_jobs import Head

    head = Head(address)
    head.check()
    jobs = [submit.find(head, submitted)] if submitted else submit.submitted(head)
    _print_rows([submit.row(job) for job in jobs], ("id", "status", "exit code", "started", "seconds", "out"))
    if submitted and jobs[0].ended:
        click.echo(submit.ending(jobs[0]))


def _run(plan: Plan, out: Path, address: str | None) -> Finished:
    from rich.console import Console

    from pipeline import session
    from pipeline.progress import LiveProgress, PlainProgress

    console = Console()
    with LiveProgress(console, plan) if console.is_terminal else PlainProgress(console) as progress:
        return session.run(plan, out, address, [progress])


def _print_plan(plan: Plan, zoo: Zoo, endpoint: str | None) -> None:
    to_make = sum(len(job.orders) for job in plan.jobs)
    where = f"published at {endpoint}" if endpoint else "not published: the zoo has no 'publish'"
    click.echo(f"zoo {zoo.name}: {len(plan.artifacts)} artifacts, {to_make} to make; {where}")
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
    _print_rows(rows, tuple(rows[0]))


def _print_results(finished: Finished) -> None:
    rows = []
    for entry in finished.results.artifacts:
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
    _print_rows(rows, tuple(rows[0]))
    for entry in finished.results.artifacts:
        if entry.status in ("rejected", "failed"):
            click.echo(f"{entry.status}: {Path(entry.model).name} {entry.recipe}: {entry.reason}")
    if finished.collection_problem:
        click.echo(finished.collection_problem)
    if finished.interrupted:
        click.echo("interrupted; run the same command again to go on")
    click.echo(finished.results_path)
    click.echo(finished.report_path)


def _print_rows(rows: Sequence[Mapping[str, object]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("model", "recipe", "status", "plan"))
    for row in rows:
        table.add_row(*(Text("" if row[column] is None else str(row[column])) for column in columns))
    # Without a terminal there's no width to keep to: logs and pipes get whole lines.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    main()
