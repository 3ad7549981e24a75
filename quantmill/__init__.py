"""quantmill from Python: ``plan``, ``run`` and ``verify`` a zoo or a checkpoint, and list the ``recipes``.

The same as the commands of these names; nothing is printed. Errors are those of ``workers.errors``.

    import quantmill

    results = quantmill.run("zoo.yaml", out="runs")
    for artifact in results.artifacts:
        print(artifact.model, artifact.recipe, artifact.status, artifact.metrics)
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.planning.automatic import load as _load
from pipeline.planning.catalog import CatalogRow, catalog
from pipeline.planning.plan import Plan
from pipeline.report.results import INTERRUPTED, Results
from pipeline.zoo import zoo as _zoos
from pipeline.zoo.zoo import Zoo
from workers import errors
from workers.spec.job import Verdict

if TYPE_CHECKING:
    from pipeline.fleet.sites import RunWatcher

__all__ = ["CatalogRow", "Plan", "Results", "Verdict", "Zoo", "plan", "recipes", "run", "verify"]

AnyZoo = str | Path | Mapping[str, object] | Zoo


def recipes() -> list[CatalogRow]:
    """The shipped recipes: bits, format, runtimes, needs, and what they were measured to cost."""
    return catalog()


def plan(zoo: AnyZoo, *, out: str | Path = "runs", strict: bool = False) -> Plan:
    """What ``run`` would make and skip, with sizes and memory; starts nothing.

    ``zoo`` is a zoo file, or its content, whose paths are relative to the current folder.

    Raises:
        UserError: the zoo is wrong, or with ``strict`` one of its models can't be made.
        HubUnavailable: the destination can't be reached.
    """
    from pipeline import session
    from pipeline.planning import plan as planning

    loaded, folder = _loaded(zoo)
    with session.destination(loaded, Path(out)) as endpoint:
        session.check_endpoint(loaded, endpoint)
        return planning.make_plan(loaded, folder, Path(out).resolve(), endpoint, strict=strict)


def run(
    zoo: AnyZoo,
    *,
    out: str | Path = "runs",
    address: str | None = None,
    webhook: str | None = None,
    strict: bool = False,
) -> Results:
    """Make, verify and publish what a zoo asks for; ``out``/``run_id`` has results.json, the report and the log.

    ``address`` is that of a running Ray cluster; None: one on this machine, for this run. Artifacts that failed or
    were rejected are in the results, as is what ended the run early (``error``).

    Raises:
        UserError: the zoo is wrong; nothing was started.
        KeyboardInterrupt: a signal ended the run; results.json is written.
    """
    from pipeline import session

    loaded, folder = _loaded(zoo)
    finished = session.run_loaded(
        loaded.name, lambda: loaded, folder, Path(out), address, webhook, _Silent(), strict=strict
    )
    error = finished.results.error
    if error is not None and error.kind == INTERRUPTED:
        raise KeyboardInterrupt
    if error is not None and finished.results_path is None:
        raise getattr(errors, error.kind, errors.UserError)(error.message)
    return finished.results


def verify(
    checkpoint: str | Path,
    reference: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = 16384,
    sequence_length: int = 512,
    runtimes: tuple[str, ...] = (),
    out: str | Path = "runs",
) -> Verdict:
    """Compare a checkpoint (a folder, or org/name[@commit]), whichever tool made it, with the model it was made of.

    ``text`` is a file to compare on; None: WikiText-2's test split, from the Hub.

    Raises:
        QuantmillError: the comparison couldn't be made.
    """
    from pipeline import checking

    request = checking.VerifyRequest(
        checkpoint=str(checkpoint),
        reference=str(reference),
        text=None if text is None else Path(text),
        tokens=tokens,
        sequence_length=sequence_length,
        gates=None,
        trust_remote_code=False,
        allow_pickle=False,
        runtimes=runtimes,
    )
    report, _, _ = checking.check(request, Path(out))
    return Verdict.model_validate(report["verdict"])


def _loaded(zoo: AnyZoo) -> tuple[Zoo, Path]:
    """A zoo, and the folder that its paths are relative to."""
    if isinstance(zoo, Zoo):
        return zoo, Path.cwd()
    if isinstance(zoo, Mapping):
        return _zoos.check(dict(zoo), "zoo"), Path.cwd()
    return _load(Path(zoo)), Path(zoo).resolve().parent


class _Silent:
    """A run's ``Screen`` that shows nothing."""

    def planned(self, plan: Plan, zoo: Zoo, endpoint: str | None) -> None:
        """See ``Screen``."""

    def progress(self, plan: Plan) -> AbstractContextManager[RunWatcher]:
        """See ``Screen``."""
        from rich.console import Console

        from pipeline.report.progress import PlainProgress

        return PlainProgress(Console(file=io.StringIO(), quiet=True), plan)
