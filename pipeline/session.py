"""Run a zoo from end to end: destination, plan, driver, results and report."""

from __future__ import annotations

import fcntl
import secrets
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.collecting import collect
from pipeline.fleet.leases import Holder, new_owner, of_this_machine
from pipeline.fleet.scheduler import Driver
from pipeline.fleet.sites import RunWatcher
from pipeline.fleet.steps import Step
from pipeline.planning import plan as planning
from pipeline.planning.plan import Plan
from pipeline.report import results as contract
from pipeline.report.ledger import Attempt, Ledger, now
from pipeline.report.logbook import Logbook
from pipeline.zoo.zoo import LOOPBACK, Zoo
from workers.errors import ZooError
from workers.machine.files import write_text
from workers.spec.job import Job, StageResult
from workers.transfer import hub

if TYPE_CHECKING:
    from pipeline.fleet.cluster import Cluster
RESULTS = "results.json"
REPORT = "report.html"
# Age at which the saved state of an interrupted pass is deleted.
PASS_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Finished:
    """A run's results, where they were written, and how it ended."""

    results: contract.Results
    results_path: Path
    report_path: Path
    interrupted: bool
    collection_problem: str | None = None


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


def new_run_id(zoo: str) -> str:
    """A unique run id that sorts by time (UTC, to the second)."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{zoo}-{secrets.token_hex(2)}"


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


def run(plan: Plan, out: Path, address: str | None, watchers: Sequence[RunWatcher]) -> Finished:
    """Run the plan's jobs, and write ``results.json`` and ``report.html``, also if interrupted.

    A plan without jobs doesn't start Ray.

    Raises:
        ZooError: another run holds the lock of ``out``.
    """
    started_at, run_id = now(), new_run_id(plan.zoo)
    folder = out.resolve() / run_id
    with ExitStack() as stack:
        stack.enter_context(_alone_in(out))
        ledger = stack.enter_context(Ledger(out))
        ledger.start(run_id, plan.zoo, started_at)
        jobs, interrupted = [], False
        if plan.jobs:
            from pipeline.fleet.cluster import Cluster
            from pipeline.report.metrics import PrometheusMetrics

            try:
                warm = any(job.orders[0].recipe.environment is None for job in plan.jobs)
                # After Ray's start, which replaces signal handlers.
                with Cluster(address, out.resolve(), warm) as cluster, _terminable():
                    folder.mkdir(parents=True)
                    log = stack.enter_context(closing(Logbook(folder, run_id)))
                    all_watchers: list[RunWatcher] = [LedgerWatcher(ledger, run_id), log, *watchers]
                    driver = Driver(cluster, plan, all_watchers, holder=_holder(cluster, address, run_id))
                    driver.watchers.append(PrometheusMetrics(plan.zoo, driver.pulse))
                    jobs = driver.jobs
                    driver.run()
            except KeyboardInterrupt:
                interrupted = True
        results = contract.build(run_id, plan.zoo, started_at, now(), plan.artifacts, jobs, plan.refused)
        ledger.finish(run_id, results.finished_at, "interrupted" if interrupted else results.status)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, results.model_dump_json(indent=1) + "\n")
    write_report(folder)
    problem = None if interrupted else _collect(plan, results)
    return Finished(results, folder / RESULTS, folder / REPORT, interrupted, problem)


def _holder(cluster: Cluster, address: str | None, run_id: str) -> Holder:
    """Lease holder among the drivers that could make the same artifacts: the cluster's, or this machine's."""
    return Holder(cluster.leases() if address else of_this_machine(), new_owner(run_id), planning.standing)


def _collect(plan: Plan, results: contract.Results) -> str | None:
    """Add the artifacts published by this or an earlier run to the zoo's collection; returns a message on failure."""
    published = [
        entry.repo_id for entry in results.artifacts if entry.repo_id and entry.status in ("published", "skipped")
    ]
    return collect(plan.collection, published) if plan.collection and published else None


def write_report(folder: Path) -> Path:
    """Render a run's ``report.html`` from its ``results.json``."""
    from pipeline.report.render import render

    path = folder / REPORT
    results = contract.Results.model_validate_json((folder / RESULTS).read_text())
    write_text(path, render(results))
    return path


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Lock the output folder, and delete partial files of killed runs and old pass states."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ZooError(f"--out: another run is at work in {str(out)!r}; wait for it, or name another") from None
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


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end a run in order, as Ctrl+C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def find_run(out: Path, run_id: str | None) -> Path:
    """The folder of a run, by default of the newest.

    Raises:
        ZooError: no such run has results.
    """
    runs = sorted(path.parent for path in out.glob(f"*/{RESULTS}"))
    if run_id is not None:
        runs = [path for path in runs if path.name == run_id]
    if not runs:
        wanted = f"run {run_id!r}" if run_id else "any run"
        raise ZooError(f"--out: no results of {wanted} in {out}; `quantmill status` lists the runs")
    return runs[-1]


def make_plan(zoo: Zoo, zoo_path: Path, out: Path, endpoint: str | None, *, strict: bool = False) -> Plan:
    """Plan a zoo read from ``zoo_path``, with absolute paths."""
    return planning.make_plan(zoo, zoo_path.resolve().parent, out.resolve(), endpoint, strict=strict)
