"""Follow a run of an output folder from another process: its stages as they end, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pipeline.ending import at_work
from pipeline.report.ledger import DIED, Ledger
from workers.errors import ZooError
from workers.spec.base import meant

EVERY_SECONDS = 1.0


def newest(out: Path) -> str:
    """The run that began last."""
    with Ledger(out) as ledger:
        runs = ledger.runs()
    if not runs:
        raise ZooError(f"status --watch: no run is recorded in {str(out)!r} yet; start one, or name another --out")
    return str(runs[0]["run_id"])


def require_known(run_id: str, runs: Collection[str]) -> None:
    """Raise ZooError if the ledger has no such run."""
    if run_id not in runs:
        raise ZooError(
            f"status: the ledger knows no run {run_id!r}; {meant(run_id, list(runs))}`quantmill status` lists the runs"
        )


def watch(out: Path, run_id: str, wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Lines: each stage of the run as it ends, those before first, then how the run ended.

    Raises:
        ZooError: the ledger doesn't know the run.
    """
    told: int | None = None  # stages; None: not even that it began
    while True:
        working = at_work(out)  # asked first: what ended since is in the ledger
        with Ledger(out) as ledger:
            runs = {str(row["run_id"]): row for row in ledger.runs()}
            require_known(run_id, runs)
            rows = ledger.attempts(run_id)
        if told is None:
            told = 0
            yield f"run {run_id} of zoo {runs[run_id]['zoo']}, begun {runs[run_id]['started_at']}"
        for row in rows[told:]:
            failed = f": {row['error']}" if row["error"] else ""
            what = " ".join(str(row[name]) for name in ("model", "recipe") if row[name])
            yield f"{row['finished_at']} {what}: {row['stage']} {row['outcome']} after {row['seconds']:.1f} s{failed}"
        told = len(rows)
        status = runs[run_id]["status"]
        if status or not working:
            yield f"run {run_id}: {status or DIED}"
            return
        wait(EVERY_SECONDS)
