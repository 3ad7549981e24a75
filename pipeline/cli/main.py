"""Define the command line. Commands import what they need when they run, so that ``--help`` is fast."""

from __future__ import annotations

import os
import sys
import traceback

import click

from pipeline.cli.calibration import calibration
from pipeline.cli.checkpoints import chat, hub, publish, verify
from pipeline.cli.drafting import init, quantize
from pipeline.cli.machine import doctor, env
from pipeline.cli.options import FAILED, WRONG
from pipeline.cli.recipes import recipes, recommend
from pipeline.cli.runs import plan, report, run, schema, status
from pipeline.cli.submitted import cancel, logs, submit


class _Group(click.Group):
    """Prints errors as a message; exits with 2 for what the user can mend, else with 1.

    A fault of quantmill's own, or of a library, is one line, too, unless ``--debug`` asks for its traceback.
    """

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:  # what read the output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(FAILED)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            message, code = _told(error)
            click.echo(f"quantmill: {message}", err=True)
            ctx.exit(code)


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    try:
        from workers.errors import QuantmillError, UserError
        from workers.machine.failures import classify
        from workers.spec.bounds import printable_lines
    except ValueError as broken:  # a plugin, which is imported with the package
        return str(broken), WRONG

    known = classify(error)
    if isinstance(known, QuantmillError):
        return printable_lines(str(known)), WRONG if isinstance(known, UserError) else FAILED
    if isinstance(known, OSError) and known.strerror:
        where = f" {str(known.filename)!r}" if known.filename else ""
        return f"{known.strerror}:{where or ' (no file is named)'}; `quantmill --debug ...` shows where", FAILED
    said = " ".join(str(known).split())
    return (
        printable_lines(f"a fault that isn't expected: {said or 'without a message'} ({type(known).__name__}); ")
        + "`quantmill --debug ...` shows where, for a report of it",
        FAILED,
    )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantmill")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
def main(debug: bool) -> None:
    """From a zoo file (models x recipes) to verified, published quantized checkpoints."""


main.add_command(quantize)
main.add_command(run)
main.add_command(plan)
main.add_command(recipes)
main.add_command(recommend)
main.add_command(calibration)
main.add_command(submit)
main.add_command(logs)
main.add_command(cancel)
main.add_command(status)
main.add_command(report)
main.add_command(doctor)
main.add_command(env)
main.add_command(hub)
main.add_command(publish)
main.add_command(verify)
main.add_command(chat)
main.add_command(init)
main.add_command(schema)
