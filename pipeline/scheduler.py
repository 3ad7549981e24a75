"""The driver: which jobs run, where and when. One failing job never stops the others."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.cluster import NETWORK_STAGES, Cluster, Node
from pipeline.plan import Plan
from pipeline.retry import wait_before_retry
from pipeline.sizing import deadline_seconds
from pipeline.steps import JobRun, Step
from workers.environment import Facts, job_problems
from workers.errors import PreflightError, WorkerDied
from workers.job import Failure, Job, Stage, StageResult

# Transfers at a time, over all jobs: fetch and publish share one line to the Hub.
TRANSFERS = 4
POLL_SECONDS = 0.5


class Watcher(Protocol):
    """Who wants to know how a run goes: the progress display, the ledger."""

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """A step was handed to a node."""

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """A step came back; ``retry_in`` is the wait in seconds if it is tried again."""


class Driver:
    """Runs a plan's jobs on a cluster."""

    def __init__(self, cluster: Cluster, plan: Plan, watchers: Sequence[Watcher]) -> None:
        self.jobs = [JobRun(index, job) for index, job in enumerate(plan.jobs)]
        self._needs = [_needs(plan, job) for job in plan.jobs]
        self._work = [_work(plan, job) for job in plan.jobs]
        self._cluster = cluster
        self._watchers = watchers
        self._nodes: dict[str, Node] = {}
        self._waiting: list[tuple[float, int, Step]] = []
        self._order = 0
        self._attempts: Counter[tuple[int, Stage, str | None]] = Counter()
        self._transfers = 0

    def run(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Run until nothing is left to do."""
        longest_first = sorted(self.jobs, key=lambda job: -sum(self._work[job.index]))
        self._place(longest_first)
        unfinished = 0
        for job in longest_first:
            if job.node:
                self._enqueue(job.first(), clock())
        while self._waiting or unfinished:
            unfinished += self._start_due(clock())
            for step, result in self._cluster.wait(POLL_SECONDS):
                unfinished -= 1
                self._transfers -= step.stage in NETWORK_STAGES
                self._end(step, result, clock())
            if not unfinished and self._waiting:
                time.sleep(max(0.0, min(self._waiting[0][0] - clock(), POLL_SECONDS)))

    def _enqueue(self, step: Step, due: float) -> None:
        self._order += 1
        heapq.heappush(self._waiting, (due, self._order, step))

    def _start_due(self, now: float) -> int:
        """Start all that is due; transfers beyond the limit keep their place in the queue."""
        held: list[tuple[float, int, Step]] = []
        started = 0
        while self._waiting and self._waiting[0][0] <= now:
            entry = heapq.heappop(self._waiting)
            step = entry[2]
            if step.generation != self.jobs[step.job].generation:
                continue
            if step.stage in NETWORK_STAGES and self._transfers >= TRANSFERS:
                held.append(entry)
                continue
            started += self._start(step, now)
        for entry in held:
            heapq.heappush(self._waiting, entry)
        return started

    def _start(self, step: Step, now: float) -> bool:
        run = self.jobs[step.job]
        self._attempts[_key(step)] += 1
        node = self._nodes.get(run.node)
        if node is None:
            failure = Failure(kind=WorkerDied.__name__, message=f"{step.stage}: the node of this job is gone")
            self._end(step, StageResult(stage=step.stage, recipe=step.recipe, failure=failure), now)
            return False
        self._transfers += step.stage in NETWORK_STAGES
        self._cluster.start(step, run.job, node, self._deadline(step, node))
        for watcher in self._watchers:
            watcher.started(run.job, step, self._attempts[_key(step)])
        return True

    def _deadline(self, step: Step, node: Node) -> float:
        shared, own = self._work[step.job]
        # All artifacts' verifications at most: which of them is the dearest doesn't matter to what hangs.
        work = shared + own if step.stage == Stage.QUANTIZE else own
        return deadline_seconds(step.stage, self._needs[step.job][1], work, node.cpus_per_stage, node.gpus)

    def _end(self, step: Step, result: StageResult, now: float) -> None:
        run, attempts = self.jobs[step.job], self._attempts[_key(step)]
        if step.generation != run.generation:
            return
        wait = wait_before_retry(result.failure, attempts) if result.failure else None
        for watcher in self._watchers:
            watcher.ended(run.job, step, attempts, result, wait)
        following = run.follow(step, result, attempts) if wait is None else self._again(run, step)
        for later in following:
            self._enqueue(later, now + (wait or 0.0))

    def _again(self, run: JobRun, step: Step) -> list[Step]:
        """The step itself; from the start on another node if its own is gone, for its files are gone with it."""
        self._nodes = {node.id: node for node in self._cluster.nodes()}
        if run.node in self._nodes:
            return [step]
        run.node = ""
        self._place([run])
        return [run.restart()] if run.node else []

    def _place(self, runs: Sequence[JobRun]) -> None:
        """Give each job the least loaded node that lacks nothing for it, or the list of what all of them lack."""
        nodes = [node for node in self._cluster.nodes() if node.cpus]
        self._nodes = {node.id: node for node in nodes}
        facts = self._cluster.probe(nodes)
        load: Counter[str] = Counter()
        for job in self.jobs:
            if job.node:
                load[job.node] += self._load(job)
        for run in runs:
            problems = {node.id: self._problems(run, facts[node.id]) for node in nodes if node.id in facts}
            fit = [node for node in nodes if node.id in problems and not problems[node.id]]
            if not fit:
                self._refuse(run, problems)
                continue
            best = min(fit, key=lambda node: (load[node.id] / node.slots, not node.gpus))
            run.node = best.id
            load[best.id] += self._load(run)

    def _load(self, run: JobRun) -> int:
        """What a job weighs; one without an estimate weighs something, too."""
        return sum(self._work[run.index]) + 1

    def _problems(self, run: JobRun, facts: Facts) -> list[str]:
        host_bytes, disk_bytes = self._needs[run.index]
        return job_problems(facts, run.job, host_bytes, disk_bytes)

    def _refuse(self, run: JobRun, problems: dict[str, list[str]]) -> None:
        lines = list(dict.fromkeys(line for found in problems.values() for line in found))
        lines = lines or ["no node of the cluster answers; start one"]
        message = f"preflight: {len(lines)} problem(s) for {run.job.model.id!r}: " + "; ".join(lines)
        failure = Failure(kind=PreflightError.__name__, message=message)
        result = StageResult(stage=Stage.FETCH, failure=failure)
        for watcher in self._watchers:
            watcher.ended(run.job, run.first(), 1, result, None)
        run.node = ""
        run.follow(run.first(), result, 1)


def _key(step: Step) -> tuple[int, Stage, str | None]:
    """Attempts count on, also when a job has moved to another node."""
    return step.job, step.stage, step.recipe


def _work(plan: Plan, job: Job) -> tuple[int, int]:
    """Multiply-adds of a job: of its one pass, and of all that its artifacts take for themselves."""
    cells = [cell for cell in plan.artifacts if cell.source.pin == job.model and not cell.skipped]
    return max(cell.estimate.pass_work for cell in cells), sum(cell.estimate.own_work for cell in cells)


def _needs(plan: Plan, job: Job) -> tuple[int, int]:
    """Host and disk bytes of a job: its dearest recipe's; all that it writes, and what lies beside it meanwhile."""
    cells = [cell for cell in plan.artifacts if cell.source.pin == job.model and not cell.skipped]
    host = max(cell.estimate.host_bytes for cell in cells)
    source = cells[0].estimate.source_bytes if job.model.folder is None else 0
    written = sum(cell.estimate.artifact_bytes + cell.estimate.spool_bytes for cell in cells)
    return host, source + written + max(cell.estimate.state_bytes for cell in cells)
