"""Commands for checkpoints: verify, publish, and serve a loopback Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import click

from pipeline.cli.options import FAILED, OUT, print_rows


@click.command()
@click.option("--root", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the files lie.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
def hub(root: Path, port: int) -> None:
    """Serve the loopback Hub, alone, until Ctrl+C."""
    from pipeline.loopback import serve

    serve(root, port)


@click.command()
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

    resolved = publishing.resolve_endpoint(endpoint)
    destination = Destination(endpoint=resolved, private=private, gated=gated or False, keep=keep, force=force)
    for line in publishing.publish(artifact, repo_id, destination, dry_run=dry_run):
        click.echo(line)


@click.command()
@click.argument("checkpoint")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this and end; more than once for more."
)
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="At most, of an answer.")
def chat(checkpoint: str, prompts: tuple[str, ...], tokens: int) -> None:
    """Talk with CHECKPOINT (a folder, or org/name), in the library that its users load it with."""
    from pipeline.talking import talk

    sys.exit(talk(checkpoint, prompts, tokens))


@click.command()
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
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Load it in this library: transformers, vLLM, llama.cpp or mlx-lm; more than once for several; left out: in "
    "its format's own.",
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
    runtimes: tuple[str, ...],
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

    request = checking.VerifyRequest(
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
        runtimes=runtimes,
    )
    report, thresholds, family = checking.check(request, out)
    verdict = report["verdict"]
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        print_rows(checking.rows(report, thresholds), ("", "what", "found", "expected"))
        if tasks:
            print_rows(checking.score_rows(report), ("task", "metric", "reference", "checkpoint"))
        for line in checking.remarks(report):
            click.echo(line)
        click.echo(f"{verdict['outcome']} by the gates of {family}: {checkpoint}")
    sys.exit(0 if verdict["accepted"] else FAILED)
