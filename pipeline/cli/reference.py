"""The reference pages, made from models and commands: ``python -m pipeline.cli.reference docs``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pipeline.cli.main import main
from pipeline.planning.catalog import measured_table, timed_table
from pipeline.zoo import reference
from pipeline.zoo.tables import rewritten
from workers.machine.files import write_text

HEAD = """# Commands

Made by `make tables` from the command line itself. Exit codes: [results](../results.md).

Completion for bash: `eval "$(_QUANTMILL_COMPLETE=bash_source quantmill)"`; for zsh `zsh_source`, for fish
`_QUANTMILL_COMPLETE=fish_source quantmill | source`. `NO_COLOR` is respected.
"""


def page() -> str:
    """The page of the command line, as Markdown."""
    parts = [HEAD]
    for names, command in _commands(main, ("quantmill",)):
        context = click.Context(command, info_name=" ".join(names))
        usage = " ".join([*names, *command.collect_usage_pieces(context)])
        help_ = " ".join((command.help or "").split("\n\n")[0].split())
        parts.append(f"\n## {' '.join(names)}\n\n{help_}\n\n```text\n{usage}\n```\n")
        options = [each for each in command.params if isinstance(each, click.Option)]
        rows = [record for each in options if (record := each.get_help_record(context))]
        if rows:
            parts.append("\n| option | says |\n| --- | --- |\n")
            parts += [f"| `{_cell(option)}` | {_cell(said)} |\n" for option, said in rows]
    return "".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _commands(group: click.Group, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield names, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*names, name))
        else:
            yield (*names, name), command


def with_measured(text: str) -> str:
    """docs/choosing.md or docs/methods.md with its table of measured recipes made anew."""
    return rewritten(text, {"measured": measured_table, "timed": timed_table})


PAGES = {"reference/zoo.md": reference.page, "reference/commands.md": page}


if __name__ == "__main__":
    docs = Path(sys.argv[1])
    for name, made in PAGES.items():
        write_text(docs / name, made())
    for name in ("choosing.md", "methods.md"):
        write_text(docs / name, with_measured((docs / name).read_text()))
