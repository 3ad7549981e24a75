"""Ends a run: the one place that writes ``results.json``, ``report.html``, the log's last line and the ledger's status,
and calls the webhook and the notifiers, whatever ended the driver.

While a run is at work, ``unfinished.json`` in its folder holds its results so far. A driver that was killed leaves it
there; ``bury`` makes it the run's ``results.json``.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Self

from pipeline.fleet.sites import RunWatcher
from pipeline.fleet.steps import JobRun, Step
from pipeline.planning.plan import Plan
from pipeline.report import notify
from pipeline.report import results as contract
from pipeline.report.ledger import Ledger, now
from pipeline.report.logbook import LOG, Logbook
from workers.errors import QuantmillError, UserError
from workers.machine.files import write_text
from workers.spec.job import Job, StageResult

RESULTS, REPORT, UNFINISHED = "results.json", "report.html", "unfinished.json"
LOCK, RESERVE = ".lock", ".reserve"
FAILED, WRONG, INTERRUPTED = 1, 2, 130
# Bytes kept free for the results, so that they can be written on a disk that the run has filled.
RESERVED_BYTES, RESERVED_BYTES_PER_ARTIFACT = 2**20, 2**13
# Seconds that snapshots may take in all, and the share of the run's time beyond them.
SNAPSHOT_SECONDS, SNAPSHOT_SHARE = 1.0, 0.02
# Attempts to lock an output folder, and the seconds between them: `quantmill status` locks it for an instant.
LOCKS, LOCK_SECONDS = 5, 0.1

KILLED = contract.ErrorEntry(kind="DriverDied", message="the driver was killed before this was finished")


@dataclass(frozen=True)
class Finished:
    """How a run ended: its exit code, results, and where they were written; notices are for the terminal.

    ``results_path`` is None where nothing was started: the zoo or the command line is wrong.
    """

    results: contract.Results
    results_path: Path | None
    exit_code: int
    notices: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.exit_code == INTERRUPTED

    @property
    def report_path(self) -> Path | None:
        """Where the report is."""
        return self.results_path.with_name(REPORT) if self.results_path else None


class Run:
    """A run so far, from its command line on."""

    def __init__(self, out: Path, zoo: str, webhook: str | None = None) -> None:
        self.out, self.zoo, self._webhook = out.resolve(), zoo, webhook
        self.id, self.started_at = new_run_id(zoo), now()
        self.plan: Plan | None = None
        self.jobs: list[JobRun] = []
        self.notices: list[str] = []
        self.started = False  # whether stages may have been started
        self.ledger: Ledger | None = None
        self.log: Logbook | None = None
        self._open = ExitStack()

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.out / self.id

    def named(self, zoo: str) -> None:
        """Name the run by its zoo, once that is read."""
        self.zoo, self.id = zoo, new_run_id(zoo)

    def begin(self, alone: AbstractContextManager[None]) -> None:
        """Record the run in the output folder's ledger, and open its log; ``alone`` lasts until it's concluded."""
        self._open.enter_context(alone)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = self._open.enter_context(Ledger(self.out))
        self.ledger.start(self.id, self.zoo, self.started_at)
        self.log = self._open.enter_context(closing(Logbook(self.folder, self.id)))
        with suppress(OSError), (self.folder / RESERVE).open("wb") as reserve:
            artifacts = len(self.plan.artifacts) if self.plan else 0
            reserve.write(bytes(max(RESERVED_BYTES, RESERVED_BYTES_PER_ARTIFACT * artifacts)))

    def results(self, ended: contract.ErrorEntry | None = None) -> contract.Results:
        """The results so far; ``ended`` says why the rest isn't finished."""
        planned, refused = (self.plan.artifacts, self.plan.refused) if self.plan else ((), ())
        learned = any(cell.order.recipe.calibrated for cell in planned)
        calibration = self.plan.calibration if self.plan and learned else None
        return contract.build(
            self.id, self.zoo, self.started_at, now(), planned, self.jobs, refused, ended, calibration
        )

    def conclude(self, error: BaseException | None, interrupted: bool = False) -> Finished:
        """Write everything that a run leaves behind, and tell the webhook and the notifiers.

        ``error`` is what ended it early.

        Raises nothing: what can't be written or posted becomes a notice.
        """
        wrong = isinstance(error, UserError) and not self.started and not interrupted
        ended = _reason(error, interrupted)
        if error is not None and not interrupted and not wrong:
            self.notices.append(f"quantmill: {_sentence(error)}")
        results, path = self.results(ended), None
        if self.log is not None or not wrong:
            path = self._write(results, error, "interrupted" if interrupted else results.status)
        with self._noticed("the end of the log or the ledger"):
            self._open.close()
        content = notify.message(results, path)
        if self._webhook:
            self.notices += filter(None, [notify.post(self._webhook, content)])
        self.notices += notify.tell(content)
        code = INTERRUPTED if interrupted else WRONG if wrong else FAILED if results.status == "failed" else 0
        return Finished(results, path, code, tuple(self.notices))

    def _write(self, results: contract.Results, error: BaseException | None, status: str) -> Path:
        """Write results and report; where the run's folder can't be written, in a temporary one. Returns the path."""
        with self._noticed("the ledger"):
            if self.ledger is None:
                self.ledger = self._open.enter_context(Ledger(self.out))
                self.ledger.start(self.id, self.zoo, self.started_at)
        (self.folder / RESERVE).unlink(missing_ok=True)
        path = self.folder / RESULTS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_results(path, results)
        except OSError as problem:
            with self._noticed(str(path)):
                path = Path(tempfile.mkdtemp(prefix=f"quantmill-{self.id}-")) / RESULTS
                _write_results(path, results)
                self.notices.append(f"quantmill: results are in {path}, for {self.folder} can't be written ({problem})")
        with self._noticed(REPORT):
            write_report(path.parent)
        with self._noticed("the ledger"):
            if self.ledger is not None:
                self.ledger.finish(self.id, results.finished_at, status)
        with self._noticed(LOG):
            if results.error is not None:
                log = self.log or self._open.enter_context(closing(Logbook(path.parent, self.id)))
                trace = "".join(traceback.format_exception(error)) if error else None
                log.over(results.error.kind, results.error.message, trace)
        return path

    @contextmanager
    def _noticed(self, what: str) -> Iterator[None]:
        """Turn any failure into a notice: the next thing is still written."""
        try:
            yield
        except Exception as error:
            self.notices.append(f"quantmill: {what} can't be written ({_sentence(error)})")


def _reason(error: BaseException | None, interrupted: bool) -> contract.ErrorEntry | None:
    if interrupted:
        return contract.ErrorEntry(kind=contract.INTERRUPTED, message="a signal ended the run")
    return contract.ErrorEntry(kind=type(error).__name__, message=_message(error)) if error is not None else None


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _sentence(error: BaseException) -> str:
    """An error in one sentence; one that isn't ours is a fault of quantmill, its traceback is in the log."""
    told = " ".join(_message(error).split())
    if isinstance(error, QuantmillError | OSError | sqlite3.Error):
        return told
    return f"{type(error).__name__}: {told} (not expected; {LOG} has the traceback)"


def _write_results(path: Path, results: contract.Results) -> None:
    write_text(path, results.model_dump_json(indent=1) + "\n")
    path.with_name(UNFINISHED).unlink(missing_ok=True)


def new_run_id(zoo: str) -> str:
    """A unique run id that sorts by time (UTC, to the second)."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{zoo}-{secrets.token_hex(2)}"


def concluded(run: Run, work: Callable[[Run], None]) -> Finished:
    """Do a run's work, and conclude it, whatever ends it: its end, an error, Ctrl+C, SIGTERM or SIGHUP."""
    error: BaseException | None = None
    with Interrupts() as interrupts:
        try:
            try:
                work(run)
            finally:
                interrupts.hold()
        except BaseException as caught:
            interrupts.hold()
            error = caught
        # Ray's own handler of SIGTERM, which it sets while it starts, raises SystemExit.
        interrupted = interrupts.seen or isinstance(error, KeyboardInterrupt | SystemExit)
        return run.conclude(error, interrupted)


class Interrupts:
    """Makes SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, until they are held.

    A signal that is ignored stays so, as under nohup. Elsewhere than in the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.seen = False
        self._held = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # what getsignal returned

    def hold(self) -> None:
        """From now on signals are only noted."""
        self._held = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            self.seen = True
            raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """Keep this process's handler of SIGTERM across a block that replaces it, as the start of Ray does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------ while it is at work


class Snapshots:
    """A watcher that keeps ``unfinished.json`` up to date."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begun, self._spent = time.monotonic(), 0.0
        with suppress(OSError):  # a full disk: the results will say so
            self._take()

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Do nothing: a started stage is no result."""

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Write the results so far."""
        if self._spent <= SNAPSHOT_SECONDS + SNAPSHOT_SHARE * (time.monotonic() - self._begun):
            self._take()

    def _take(self) -> None:
        begun = time.monotonic()
        path = self._run.folder / UNFINISHED
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(self._run.results(KILLED).model_dump_json(indent=1) + "\n")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._spent += time.monotonic() - begun


class Unfailing:
    """A watcher whose failures are said once and don't end the run, such as a log on a full disk."""

    def __init__(self, watcher: RunWatcher) -> None:
        self._watcher = watcher
        self._told = False

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """See ``RunWatcher``."""
        with self._tolerated():
            self._watcher.started(job, step, attempt)

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """See ``RunWatcher``."""
        with self._tolerated():
            self._watcher.ended(job, step, attempt, result, retry_in)

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._told:
                self._told = True
                with suppress(OSError):
                    print(f"quantmill: {type(self._watcher).__name__}: {_sentence(error)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ folders of runs


@contextmanager
def lock(out: Path) -> Iterator[bool]:
    """Lock an output folder for this process while the context lasts; False if another one holds it."""
    with (out / LOCK).open("a") as file:
        for left in reversed(range(LOCKS)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not left:
                    yield False
                    return
                time.sleep(LOCK_SECONDS)
            else:
                break
        yield True


def at_work(out: Path) -> bool:
    """Whether a run holds the lock of an output folder."""
    if not (out / LOCK).exists():
        return False
    with (out / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def bury(out: Path) -> None:
    """Write the results of runs whose driver was killed, from what they left; the caller holds the folder's lock."""
    for left in out.glob(f"*/{UNFINISHED}"):
        with suppress(OSError):
            (left.parent / RESERVE).unlink(missing_ok=True)
            if (left.parent / RESULTS).exists():
                left.unlink()
            else:
                left.rename(left.parent / RESULTS)
                write_report(left.parent)


def write_report(folder: Path) -> Path:
    """Render a run's ``report.html`` from its results, those so far if it is at work.

    Raises:
        OSError, ValueError: the results can't be read, or the report not written.
    """
    from pipeline.report import night
    from pipeline.report.render import render

    path = folder / REPORT
    write_text(path, render(night.about(results_of(folder), folder)))
    return path


def results_of(folder: Path) -> contract.Results:
    """The results of a run, those so far if it is at work.

    Raises:
        OSError, ValueError: they can't be read.
    """
    source = folder / RESULTS if (folder / RESULTS).exists() else folder / UNFINISHED
    content = json.loads(source.read_text())
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != contract.SCHEMA_VERSION:
        raise ValueError(
            f"{source}: results of schema version {version!r}, and this quantmill reads {contract.SCHEMA_VERSION}; "
            "read them with the release that wrote them, or run the zoo again"
        )
    return contract.Results.model_validate(content)
