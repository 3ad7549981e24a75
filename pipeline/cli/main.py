"""Define the command line. Commands import what they need when they run, so that ``--help`` is fast."""

from __future__ import annotations

import click

from pipeline.cli.checkpoints import hub, publish, verify
from pipeline.cli.drafting import init, quantize
from pipeline.cli.machine import doctor, env
from pipeline.cli.options import FAILED, WRONG
from pipeline.cli.recipes import recipes, recommend
from pipeline.cli.runs import plan, report, run, schema, status
from pipeline.cli.submitted import cancel, logs, submit


class _Group(click.Group):
    """Prints the package's own errors as a message; exits with 2 for what the user can mend, else with 1."""

    def invoke(self, ctx: click.Context) -> object:
        from workers.errors import QuantmillError, UserError
        from workers.spec.bounds import printable_lines

        try:
            return super().invoke(ctx)
        except QuantmillError as error:
            click.echo(printable_lines(f"quantmill: {type(error).__name__}: {error}"), err=True)
            ctx.exit(WRONG if isinstance(error, UserError) else FAILED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantmill")
def main() -> None:
    """From a zoo file (models x recipes) to verified, published quantized checkpoints."""


main.add_command(quantize)
main.add_command(run)
main.add_command(plan)
main.add_command(recipes)
main.add_command(recommend)
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
main.add_command(init)
main.add_command(schema)
