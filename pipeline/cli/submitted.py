"""Commands for runs submitted to a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from pipeline.cli.options import ADDRESS, INTERRUPTED, LOST, ZOO, print_json, print_rows

if TYPE_CHECKING:
    from pipeline.submit.ray_jobs import JobsClient


@click.command()
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
    from pipeline.planning.automatic import load
    from pipeline.submit import parcel, submit
    from pipeline.submit.ray_jobs import JobsClient
    from workers.errors import TransientError
    from workers.spec.bounds import printable_lines

    loaded = load(zoo)
    submit.check(loaded, out)
    packed = parcel.pack(loaded, zoo, shared)
    for note in packed.notes:
        click.echo(f"can't be made: {printable_lines(note)}", err=True)
    head = JobsClient(address)
    head.check()
    try:
        submission = submit.submit(head, loaded, packed, out, python)
    except TransientError as error:
        click.echo(f"quantmill: {error}", err=True)
        sys.exit(LOST)
    if submission.attached:
        click.echo(f"{submission.name} is at work already; nothing new was started")
    else:
        click.echo(f"submitted {submission.name} ({packed.bytes / 1e6:.1f} MB)")
    if follow:
        _follow(head, submission.name)
    click.echo(f"follow it: quantmill logs {submission.name} --address {head.address} --follow")
    click.echo(f"cancel it: quantmill cancel {submission.name} --address {head.address}")


@click.command()
@click.argument("submitted", metavar="ID")
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the run has ended, and end with its exit code.")
def logs(submitted: str, address: str, follow: bool) -> None:
    """Print what the submitted run ID has printed."""
    from pipeline.submit import submit
    from pipeline.submit.ray_jobs import JobsClient

    head = JobsClient(address)
    head.check()
    submit.find(head, submitted)
    if follow:
        _follow(head, submitted)
    click.echo(head.logs(submitted), nl=False)


@click.command()
@click.argument("submitted", metavar="ID")
@ADDRESS
def cancel(submitted: str, address: str) -> None:
    """End the submitted run ID in order: what it was at is given up, results.json and the report are written."""
    from pipeline.submit import submit
    from pipeline.submit.ray_jobs import JobsClient
    from workers.errors import TransientError

    head = JobsClient(address)
    head.check()
    try:
        click.echo(submit.ending(submit.cancel(head, submitted)))
    except TransientError as error:
        click.echo(f"quantmill: {error}", err=True)
        sys.exit(LOST)


def _follow(head: JobsClient, submitted: str) -> NoReturn:
    """Print a submitted run's output until it has ended, and exit with its exit code."""
    from pipeline.submit import submit
    from workers.errors import TransientError

    def notify(notice: str) -> None:
        click.echo(f"quantmill: {notice}", err=True)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = submit.follow(head, submitted, write, notify)
    except TransientError as error:
        notify(str(error))
        notify(f"follow it again: quantmill logs {submitted} --address {head.address} --follow")
        sys.exit(LOST)
    except KeyboardInterrupt:
        notify(f"{submitted} goes on; follow it again: quantmill logs {submitted} --address {head.address} --follow")
        notify(f"or cancel it: quantmill cancel {submitted} --address {head.address}")
        sys.exit(INTERRUPTED)
    click.echo(submit.ending(job))
    sys.exit(submit.exit_code(job))


def print_submitted(address: str, submitted: str | None, *, as_json: bool = False) -> None:
    from pipeline.submit import submit
    from pipeline.submit.ray_jobs import JobsClient

    head = JobsClient(address)
    head.check()
    jobs = [submit.find(head, submitted)] if submitted else submit.submitted(head)
    if as_json:
        print_json([submit.row(job) for job in jobs])
        return
    print_rows([submit.row(job) for job in jobs], ("id", "status", "exit code", "started", "seconds", "out"))
    if submitted and jobs[0].ended:
        click.echo(submit.ending(jobs[0]))
