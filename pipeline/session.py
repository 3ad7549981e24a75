"""Run a zoo from end to end: destination, plan, driver; ``pipeline.ending`` writes the results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.collecting import collect
from pipeline.ending import (
    LOCK,
    RESULTS,
    UNFINISHED,
    Finished,
    Run,
    Snapshots,
    Unfailing,
    at_work,
    bury,
    concluded,
    lock,
    terminable,
)
from pipeline.ending import REPORT as REPORT
from pipeline.ending import results_of as results_of
from pipeline.ending import write_report as write_report
from pipeline.fleet.leases import Holder, new_owner, of_this_machine
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.sites import RunWatcher
from pipeline.fleet.steps import Step
from pipeline.planning import plan as planning
from pipeline.planning.automatic import load as load_zoo
from pipeline.planning.plan import Plan
from pipeline.report import results as contract
from pipeline.report.ledger import Attempt, Ledger
from pipeline.zoo.zoo import LOOPBACK, Zoo
from workers.errors import ZooError
from workers.spec.base import meant
from workers.spec.job import Job, StageResult
from workers.transfer import hub, reach

if TYPE_CHECKING:
    from pipeline.fleet.cluster import Cluster
# Age at which the saved state of an interrupted pass is deleted.
PASS_SECONDS = 7 * 24 * 3600.0


class Screen(Protocol):
    """What shows a run to its user."""

    def planned(self, plan: Plan, zoo: Zoo, endpoint: str | None) -> None:
        """Show the plan before anything is started."""

    def progress(self, plan: Plan) -> AbstractContextManager[RunWatcher]:
        """A watcher that shows progress while its context lasts."""


@contextmanager
def destination(zoo: Zoo, out: Path, address: str | None = None) -> Iterator[str | None]:
    """The endpoint to publish to, valid within the context: None for nowhere, the embedded Hub's for ``loopback``.

    Raises:
        ZooError: the zoo names the embedded Hub, but runs on a cluster, whose other nodes can't reach it.
    """
    if zoo.publish is None:
        yield None
    elif zoo.publish.endpoint != LOOPBACK:
        yield hub.normalized(zoo.publish.endpoint)
    elif address:
        raise ZooError(
            f"publish.endpoint: the loopback Hub can't be reached from the cluster, got --address {address!r}; "
            "leave --address out, or name a Hub by its URL"
        )
    else:
        from pipeline.loopback import LoopbackHub

        with LoopbackHub(out / "hub") as embedded:
            yield embedded.endpoint


@runtime_checkable
class ShowsPhases(Protocol):
    """A watcher that shows what stages are at."""

    def shows(self, phases: Mapping[str, str]) -> None:
        """Show these phases, by the labels of stages, as they stand there at any time."""


class LedgerWatcher:
    """Records every stage that ended in the ledger."""

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self._ledger = ledger
        self._run_id = run_id

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Do nothing: the ledger records only results."""

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Record the attempt and its result."""
        fingerprint = job.order(step.recipe).fingerprint if step.recipe else None
        attempted = Attempt(job.model.id, job.model.revision, step.recipe, fingerprint, attempt)
        self._ledger.record(self._run_id, attempted, result)


def run_zoo(
    zoo_path: Path, out: Path, address: str | None, webhook: str | None, screen: Screen, *, strict: bool = False
) -> Finished:
    """Run a zoo file, from reading it to its results; the webhook is called whatever comes of it. Raises nothing."""
    folder = zoo_path.resolve().parent
    return run_loaded(
        zoo_path.stem, lambda: load_zoo(zoo_path, out), folder, out, address, webhook, screen, strict=strict
    )


def run_loaded(
    name: str,
    load: Callable[[], Zoo],
    folder: Path,
    out: Path,
    address: str | None,
    webhook: str | None,
    screen: Screen,
    *,
    strict: bool = False,
) -> Finished:
    """Run the zoo that ``load`` gives, whose paths are relative to ``folder``; ``name`` is the run's until it's loaded.

    Raises nothing; see ``run_zoo``.
    """

    def work(run: Run) -> None:
        zoo = load()
        run.named(zoo.name)
        with destination(zoo, out, address) as endpoint:
            check_endpoint(zoo, endpoint)
            plan = run.plan = planning.make_plan(zoo, folder, out.resolve(), endpoint, strict=strict)
            screen.planned(plan, zoo, endpoint)
            with screen.progress(plan) as progress:
                _drive(run, plan, address, [progress])

    return concluded(Run(out, name, webhook), work)


Start = Callable[[str | None, Path, bool], AbstractContextManager["Cluster"]]


def _start(address: str | None, workspace: Path, warm: bool) -> Cluster:
    from pipeline.fleet.cluster import Cluster

    return Cluster(address, workspace, warm)


def run(
    plan: Plan,
    out: Path,
    address: str | None,
    watchers: Sequence[RunWatcher],
    webhook: str | None = None,
    start: Start = _start,
) -> Finished:
    """Run a plan's jobs, and write its results, whatever ends it; ``start`` gives what executes it. Raises nothing."""

    def work(run: Run) -> None:
        run.plan = plan
        _drive(run, plan, address, watchers, start)

    return concluded(Run(out, plan.zoo, webhook), work)


def _drive(run: Run, plan: Plan, address: str | None, watchers: Sequence[RunWatcher], start: Start = _start) -> None:
    """Make, verify and publish what the plan lacks; a plan without jobs doesn't start Ray.

    Raises:
        ZooError: another run holds the lock of the output folder, or there is no cluster at ``address``.
        TransientError: Ray doesn't start, or its head died.
    """
    with ExitStack() as stack:
        run.begin(_alone_in(run.out))
        assert run.ledger is not None
        assert run.log is not None
        snapshots = Snapshots(run)
        if plan.jobs:
            from pipeline.report.metrics import PrometheusMetrics

            warm = any(job.orders[0].recipe.environment is None for job in plan.jobs)
            with terminable():
                cluster = stack.enter_context(start(address, run.out, warm))
            run.started = True
            for watcher in watchers:
                if isinstance(watcher, ShowsPhases):
                    watcher.shows(cluster.phases)
            all_watchers: list[RunWatcher] = [LedgerWatcher(run.ledger, run.id), run.log, *watchers, snapshots]
            holder = _holder(cluster, address, run.id)
            stack.enter_context(closing(holder))
            driver = Driver(cluster, plan, [Unfailing(each) for each in all_watchers], holder=holder)
            driver.watchers.append(Unfailing(PrometheusMetrics(plan.zoo, driver.pulse)))
            run.jobs = driver.jobs
            driver.run()
        run.started = True
    run.notices += _collect(plan, run.results())


def check_endpoint(zoo: Zoo, endpoint: str | None) -> None:
    """Check that something answers where artifacts are to be published, before the plan asks it a thousand things.

    Raises:
        HubUnavailable: nothing does.
    """
    chosen = zoo.publish.endpoint if zoo.publish else None
    if endpoint and chosen != LOOPBACK and endpoint.startswith(("http://", "https://")):
        reach.check(endpoint, "publish.endpoint" if chosen else "HF_ENDPOINT")


def _holder(cluster: Cluster, address: str | None, run_id: str) -> Holder:
    """Lease holder among the drivers that could make the same artifacts: the cluster's, or this machine's."""
    return Holder(cluster.leases() if address else of_this_machine(), new_owner(run_id), planning.standing)


def _collect(plan: Plan, results: contract.Results) -> list[str]:
    """Add the artifacts published by this or an earlier run to the zoo's collection; returns what failed."""
    published = [
        entry.repo_id for entry in results.artifacts if entry.repo_id and entry.status in ("published", "skipped")
    ]
    problem = collect(plan.collection, published) if plan.collection and published else None
    return [problem] if problem else []


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Lock the output folder, conclude killed runs, and delete their partial files and old pass states.

    Raises:
        ZooError: another run holds the lock, or the folder can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        raise ZooError(f"--out: {str(out)!r} can't be written ({error}); name another folder") from error
    with lock(out) as alone:
        if not alone:
            raise ZooError(f"--out: another run is at work in {str(out)!r}; wait for it, or name another")
        bury(out)
        with Ledger(out) as ledger:
            ledger.bury()
        for leftover in [*out.glob("artifacts/.*.partial"), *out.glob("references/.*.partial"), *out.glob("scratch/*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        for state in out.glob("passes/*"):
            # Interrupted passes that no run resumed.
            if time.time() - max(path.stat().st_mtime for path in [state, *state.iterdir()]) > PASS_SECONDS:
                shutil.rmtree(state, ignore_errors=True)
        yield


def find_run(out: Path, run_id: str | None) -> Path:
    """The folder of a run, by default of the newest; a run whose driver was killed gets its results written.

    Raises:
        ZooError: no such run has results.
    """
    if out.is_dir() and not at_work(out):
        with lock(out) as alone:
            if alone:
                bury(out)
    runs = sorted({path.parent for name in (RESULTS, UNFINISHED) for path in out.glob(f"*/{name}")})
    hint = meant(run_id, [path.name for path in runs]) if run_id else ""
    if run_id is not None:
        runs = [path for path in runs if path.name == run_id]
    if not runs:
        wanted = f"run {run_id!r}" if run_id else "any run"
        raise ZooError(f"--out: no results of {wanted} in {out}; {hint}`quantmill status` lists the runs")
    return runs[-1]


def make_plan(zoo: Zoo, zoo_path: Path, out: Path, endpoint: str | None, *, strict: bool = False) -> Plan:
    """Plan a zoo read from ``zoo_path``, with absolute paths."""
    return planning.make_plan(zoo, zoo_path.resolve().parent, out.resolve(), endpoint, strict=strict)
