"""The driver (scheduler): decide which jobs run where and when. One failing job never stops the others.

Each kind of node has a queue of jobs. A node that will soon have nothing to compute takes the first job that fits, so
that models are fetched while others compute, as far ahead as the disk allows. A node runs the last stages of jobs
first, so that artifacts are published early. The driver only decides, from what nodes have and jobs need; a ``Fleet``
executes the decisions.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.fleet.demand import demands
from pipeline.fleet.leases import ASK_SECONDS, RENEW_SECONDS, Holder
from pipeline.fleet.placement import Claim, gigabytes
from pipeline.fleet.retry import Retry, RetryMode, decide
from pipeline.fleet.sites import Fleet, RunWatcher, Site, Sites
from pipeline.fleet.spreads import Spread, cards_for, parts_for
from pipeline.fleet.steps import NETWORK_STAGES, JobRun, Step
from pipeline.planning.plan import Plan
from pipeline.planning.sizing import deadline_seconds
from workers.errors import DeviceLost, DiskFull, PreflightError, WorkerDied
from workers.spec.job import Failure, Part, Stage, StageResult
from workers.spec.split import spreadable, whole_engines

# Most concurrent transfers of one stage on one node: they share its network connection.
TRANSFERS = 4
POLL_SECONDS = 0.5
# Interval between checks for new nodes, which may join at any time.
SURVEY_SECONDS = 60.0
# How many times others may overtake a stage that doesn't fit yet, before the node drains for it.
PATIENCE = 16
# Shorter passes aren't spread: they end before the parts' processes would have started and synchronised three times.
SPREAD_SECONDS = 300.0
# Priority of stages on a node, lowest number first: later stages come before earlier ones.
URGENCY = {Stage.PUBLISH: 1, Stage.KEEP: 1, Stage.VERIFY: 2, Stage.QUANTIZE: 3, Stage.FETCH: 4}

DIED, CARD_LOST = WorkerDied.__name__, DeviceLost.__name__

Key = tuple[int, Stage, str | None, Part | None]


@dataclass(frozen=True)
class Flight:
    """A running step: its node, its claim, and its mode."""

    site: str
    claim: Claim
    mode: RetryMode


@dataclass(frozen=True)
class Pulse:
    """Snapshot of a run: queued jobs, running stages, GPUs in all and in use."""

    queued: int
    running: dict[Stage, int]
    gpus: int
    busy_gpus: float


class Driver:
    """Runs a plan's jobs on a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        plan: Plan,
        watchers: Sequence[RunWatcher],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        holder: Holder | None = None,
        spread_seconds: float = SPREAD_SECONDS,
    ) -> None:
        self.spread_seconds = spread_seconds
        self.jobs = [JobRun(index, job) for index, job in enumerate(plan.jobs)]
        self._demands = demands(plan)
        self._sites = Sites(self.jobs, self._demands)
        self._fleet = fleet
        self.watchers = list(watchers)
        self._clock, self._sleep = clock, sleep
        self._holder, self._renewed = holder, 0.0
        self._held_elsewhere: list[tuple[float, int]] = []  # time of the next attempt to lease, job
        self._work_left = sum(demand.work for demand in self._demands)
        self._changed_nodes: set[str] = set()
        self._delayed: list[tuple[float, int, Step, RetryMode]] = []
        self._flying: dict[Step, Flight] = {}
        self._alone: set[Step] = set()
        self._open: Counter[int] = Counter()  # steps of a job that are ready, delayed or flying
        self._attempts: Counter[Key] = Counter()
        self._failed: defaultdict[Key, list[tuple[str, RetryMode]]] = defaultdict(list)
        self._spreads: dict[int, Spread] = {}
        self._order = itertools.count()
        self._surveyed = 0.0

    # -------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Run until no job is left."""
        self._sites.queued = {run.index for run in self.jobs}
        self._survey()
        while True:
            self._wake()
            self._fill()
            if self._flying:
                for step, result in self._fleet.wait(POLL_SECONDS):
                    self._land(step, result)
            elif self._delayed or self._held_elsewhere:
                due = [entry[0] for entry in self._delayed[:1]] + [when for when, _ in self._held_elsewhere[:1]]
                self._sleep(max(0.0, min(min(due) - self._clock(), POLL_SECONDS)))
            elif self._sites.queued:
                self._refuse_rest()
            else:
                return
            if self._sites.queued and self._clock() - self._surveyed > SURVEY_SECONDS:
                self._survey()

    def infeasible(self) -> list[tuple[JobRun, str]]:
        """The jobs that fit on no node, and why; starts nothing."""
        self._sites.queued = {run.index for run in self.jobs}
        self._survey()
        failures = [(run, artifact.failure) for run in self.jobs for artifact in run.artifacts.values()]
        return [(run, failure.message) for run, failure in failures if failure]

    def pulse(self) -> Pulse:
        """The current snapshot of the run."""
        return Pulse(
            queued=len(self._sites.queued) + len(self._held_elsewhere),
            running=dict(Counter(step.stage for step in self._flying)),
            gpus=sum(site.room.node.gpus for site in self._sites.all()),
            busy_gpus=sum(flight.claim.gpus for flight in self._flying.values()),
        )

    def _wake(self) -> None:
        while self._delayed and self._delayed[0][0] <= self._clock():
            _, _, step, mode = heapq.heappop(self._delayed)
            self._make_ready(step, mode)
        if self._holder is None:
            return
        if self._clock() - self._renewed > RENEW_SECONDS:
            self._renewed = self._clock()
            self._holder.renew()
        while self._held_elsewhere and self._held_elsewhere[0][0] <= self._clock():
            self._retry_lease(self._holder, self.jobs[heapq.heappop(self._held_elsewhere)[1]])

    def _retry_lease(self, holder: Holder, run: JobRun) -> None:
        """Try again to lease a job held by another driver; skip the artifacts which that driver has made."""
        if not holder.hold(run.index, run.job):
            heapq.heappush(self._held_elsewhere, (self._clock() + ASK_SECONDS, run.index))
            return
        run.made_elsewhere(holder.existing(run.job))
        if run.job.orders:
            self._offer(run.index)
            self._changed_nodes |= self._sites.names
        else:
            self._let_go(run)

    def _fill(self) -> None:
        """Assign jobs to the nodes where something changed, and start their steps, until nothing more fits."""
        while self._changed_nodes:
            changed, self._changed_nodes = self._changed_nodes & self._sites.names, set()
            by_load = [(self._sites[name].relative_load, name) for name in changed]
            heapq.heapify(by_load)
            while by_load and self._sites.queued:
                # The node that would be idle first chooses first.
                _, name = heapq.heappop(by_load)
                site = self._sites[name]
                if site.wants_more and (index := self._sites.next_job(site, self._horizon)) is not None:
                    self._place(self.jobs[index], name)
                    heapq.heappush(by_load, (site.relative_load, name))
            for name in sorted(changed):
                self._start_ready(name)

    # ------------------------------------------------------------------------------- which job goes where

    def _survey(self) -> None:
        """List the nodes, probe new ones, and queue jobs again if needed; jobs that fit no node fail."""
        self._surveyed = self._clock()
        nodes = {node.id: node for node in self._fleet.nodes() if node.cpus and node.id not in self._sites.shunned}
        orphans = self._forget(self._sites.names - set(nodes))
        new = [node for name, node in nodes.items() if name not in self._sites.names]
        probed = self._fleet.probe(new, self._sites.environments) if new else {}
        changed = self._sites.add(nodes, probed)
        for index in sorted(self._sites.queued) if changed else orphans:
            self._offer(index)
        self._changed_nodes = self._sites.names

    @property
    def _horizon(self) -> float:
        """Time in which the whole cluster finishes the remaining work, in units of work over speed."""
        return self._work_left / self._sites.speed

    def _offer(self, index: int) -> None:
        """Queue a job at the nodes that it fits; fail it with the reasons if it fits none.

        Recipes that no node can make fail alone.
        """
        lines, run = self._sites.offer(index), self.jobs[index]
        if lines is None:
            return
        apart = self._sites.unmakeable(index)
        if not apart or len(apart) == len(run.job.orders):
            self._refuse(run, lines)
            return
        for recipe, lacks in apart.items():
            what = f"{run.job.model.id!r} under recipe {recipe!r}"
            failure = _infeasible(what, lacks)
            step = run.leave_out(recipe, failure)
            for watcher in self.watchers:
                watcher.ended(run.job, step, 1, StageResult(stage=step.stage, recipe=recipe, failure=failure), None)
        self._sites.queued.add(index)
        self._offer(index)

    def _place(self, run: JobRun, name: str) -> None:
        self._sites.queued.discard(run.index)
        if self._holder and not self._holder.hold(run.index, run.job):
            heapq.heappush(self._held_elsewhere, (self._clock() + ASK_SECONDS, run.index))
            return
        site, demand = self._sites[name], self._demands[run.index]
        run.node = name
        site.backlog.add(run.index)
        site.load += demand.work
        site.room.free_disk -= demand.disk
        self._open[run.index] += 1
        self._make_ready(run.first(), RetryMode.SAME)

    def _unplace(self, run: JobRun) -> None:
        """Remove a job that is done or moves from its node. Its files stay there, so its disk remains reserved."""
        if site := self._sites.get(run.node):
            site.backlog.discard(run.index)
            site.load -= self._demands[run.index].work
            self._changed_nodes.add(run.node)

    def _forget(self, gone: set[str]) -> list[int]:
        """Remove nodes that are gone; returns their waiting jobs, to be queued. Running steps come back as failed."""
        for name in gone:
            self._sites.remove(name)
        flying = {step.job for step in self._flying}
        waiting = [run for run in self.jobs if run.node in gone and self._open[run.index]] if gone else []
        orphans = [run for run in waiting if run.index not in flying]
        for run in orphans:
            self._reset(run)
        self._sites.queued.update(run.index for run in orphans if run.job.orders)
        return [run.index for run in orphans if run.job.orders]

    def _reset(self, run: JobRun) -> None:
        self._unplace(run)
        self._spreads.pop(run.index, None)
        run.node = ""
        run.restart()
        self._open[run.index] = 0

    def _restart(self, run: JobRun) -> None:
        """Restart a job from its first step on another node, with the artifacts that aren't finished."""
        self._reset(run)
        if run.job.orders:
            self._offer(run.index)
            self._changed_nodes |= self._sites.names

    # --------------------------------------------------------------------------------- which step, when

    def _make_ready(self, step: Step, mode: RetryMode) -> None:
        if step.generation != self.jobs[step.job].generation:
            return
        site = self._sites.get(self.jobs[step.job].node)
        if site is None:
            self._restart(self.jobs[step.job])
            return
        if mode is RetryMode.ALONE:
            self._alone.add(step)
        urgency = 0 if mode is RetryMode.ALONE else URGENCY[step.stage]
        heapq.heappush(site.ready, (urgency, -self._demands[step.job].work, next(self._order), step))
        self._changed_nodes.add(self.jobs[step.job].node)

    def _start_ready(self, name: str) -> None:
        """Start the ready steps that fit, in order; a step overtaken ``PATIENCE`` times blocks later ones."""
        site = self._sites[name]
        computing = sum(entry[3].stage not in NETWORK_STAGES for entry in site.ready)
        postponed: list[tuple[int, int, int, Step]] = []
        blocked = False
        while site.ready:
            entry = heapq.heappop(site.ready)
            step = entry[3]
            if step.generation != self.jobs[step.job].generation:
                continue
            network = step.stage in NETWORK_STAGES
            if computing == 1 and self._spread(site, step):
                # Its parts are ready now instead of it.
                computing += self._spreads[step.job].parts - 1
                continue
            claim = None if blocked and not network else self._claim(site, step, computing)
            if claim is None:
                postponed.append(entry)
                alone = step in self._alone
                blocked |= not network and (alone or site.passed_over >= PATIENCE)
                continue
            if not network:
                computing -= 1
                overtakes = any(other[3].stage not in NETWORK_STAGES for other in postponed)
                site.passed_over = site.passed_over + 1 if overtakes else 0
            self._start(name, site, step, claim)
        for entry in postponed:
            heapq.heappush(site.ready, entry)

    def _claim(self, site: Site, step: Step, computing: int) -> Claim | None:
        need = self._demands[step.job].need(step.stage, step.recipe)
        if step.stage in NETWORK_STAGES:
            return site.room.transfer(need) if site.transfers[step.stage] < TRANSFERS else None
        if step in self._alone:
            return site.room.alone(need)
        if several := self._several(site, step, computing):
            return several
        if computing <= site.room.idle_cards:
            return site.room.compute(need)
        # Sharing a GPU N ways slows the job N times; allow it only if it still finishes before the rest.
        alone = self._demands[step.job].work / site.room.speed
        return site.room.compute(need, most=max(1, int(self._horizon / alone)))

    def _others_come(self, site: Site) -> bool:
        """Whether jobs that aren't ready to compute yet could use what is idle on a node: queued ones, and its own that
        are being fetched."""
        fetching = any(Stage.FETCH not in self.jobs[index].seconds for index in site.backlog)
        return bool(self._sites.queued or self._held_elsewhere or fetching)

    def _several(self, site: Site, step: Step, computing: int) -> Claim | None:
        """Several cards of a node for a stage that has a use for them, where they would be idle otherwise: at most its
        share among the stages that are ready there to compute."""
        job, demand = self.jobs[step.job].job, self._demands[step.job]
        # After a card was lost, one card tells whether it is that one. Libraries of whole models have their own ways.
        lost = any(kind == CARD_LOST for kind, _ in self._failed[_key(step)])
        by_library = step.stage == Stage.QUANTIZE and whole_engines(job)
        if lost or by_library or self._others_come(site):
            return None
        cards = cards_for(step, demand, site.room, site.room.idle_cards // computing, self.spread_seconds)
        return site.room.several(demand.need(step.stage, step.recipe), cards) if cards > 1 else None

    def _spread(self, site: Site, step: Step) -> bool:
        """Spread a long pass over slots of its node that would be idle otherwise; only while no other job waits."""
        run, demand = self.jobs[step.job], self._demands[step.job]
        if step in self._alone or self._others_come(site) or not spreadable(run.job):
            return False
        parts = parts_for(step, demand, site.room, self.spread_seconds)
        if parts < 2:
            return False
        self._spreads[step.job] = Spread(step, parts, self._clock())
        self._make_parts_ready(self._spreads[step.job].begin("gather"))
        return True

    def _make_parts_ready(self, parts: Iterable[Step]) -> None:
        for part in sorted(parts, key=str):
            self._make_ready(part, RetryMode.SAME)

    def _land_part(self, run: JobRun, step: Step, result: StageResult) -> StageResult | None:
        """Record a part's end, start the next step's parts; returns the stage's result once all ended or one failed."""
        spread = self._spreads[run.index]
        spread.land(step, result)
        if result.failure is None and not spread.through(step):
            self._make_parts_ready(spread.following(step))
            return None
        del self._spreads[run.index]
        return result.model_copy(update={"memory": spread.memory, "seconds": self._clock() - spread.begun})

    def _start(self, name: str, site: Site, step: Step, claim: Claim) -> None:
        run, node, demand = self.jobs[step.job], site.room.node, self._demands[step.job]
        site.room.take(claim)
        if step.stage in NETWORK_STAGES:
            site.transfers[step.stage] += 1
        if step.stage == Stage.QUANTIZE:
            site.backlog.discard(step.job)
            self._changed_nodes.add(name)
        self._attempts[_key(step)] += 1
        self._flying[step] = Flight(name, claim, RetryMode.ALONE if step in self._alone else RetryMode.SAME)
        work = demand.pass_work + demand.own_work if step.stage == Stage.QUANTIZE else demand.own_work
        seconds = deadline_seconds(step.stage, demand.source_bytes, work, node.cpus_per_stage, node.gpus)
        self._fleet.start(step, run.job, node, claim, seconds)
        if step.part and step.part != Part(step="gather", of=step.part.of):
            return  # watchers see a spread pass as one stage
        for watcher in self.watchers:
            watcher.started(run.job, step, self._attempts[_key(step)])

    # ------------------------------------------------------------------------------------ what came of it

    def _land(self, step: Step, result: StageResult) -> None:
        flight = self._flying.pop(step)
        self._alone.discard(step)
        if site := self._sites.get(flight.site):
            site.room.give(flight.claim)
            if step.stage in NETWORK_STAGES:
                site.transfers[step.stage] -= 1
            self._changed_nodes.add(flight.site)
        run, attempts = self.jobs[step.job], self._attempts[_key(step)]
        if step.generation != run.generation or (step.part and run.index not in self._spreads):
            return
        if result.failure and result.failure.kind == CARD_LOST:
            result = self._told(result, result.failure, self._sites.card_failed(flight.site, flight.claim))
        retry = self._decide_retry(step, result.failure, flight) if result.failure else None
        if retry is not None and retry.mode is not RetryMode.SAME and result.failure is not None:
            result = self._told(result, result.failure, f"next: {retry.mode.value}")
        if step.part and (retry is None or retry.mode is not RetryMode.SAME):
            whole = self._land_part(run, step, result)
            if whole is None:
                return
            # The spread is over; a retry in another mode runs the whole pass in one piece.
            step, result = replace(step, part=None), whole
        following = run.follow(step, result, attempts) if retry is None else []
        for watcher in self.watchers:
            watcher.ended(run.job, step, attempts, result, retry.seconds if retry else None)
        if retry is not None:
            kind = result.failure.kind if result.failure else ""
            self._repeat(run, step, retry, died=kind in (DIED, CARD_LOST))
            return
        self._open[run.index] -= 1
        for later in following:
            self._open[run.index] += 1
            self._make_ready(later, RetryMode.SAME)
        if not self._open[run.index]:
            self._unplace(run)
            self._let_go(run)

    @staticmethod
    def _told(result: StageResult, failure: Failure, more: str) -> StageResult:
        """The result with more in its failure's message."""
        message = f"{failure.message}; {more}" if more else failure.message
        return result.model_copy(update={"failure": failure.model_copy(update={"message": message})})

    def _let_go(self, run: JobRun) -> None:
        self._work_left -= self._demands[run.index].work
        if self._holder:
            self._holder.let_go(run.index)

    def _decide_retry(self, step: Step, failure: Failure, flight: Flight) -> Retry | None:
        history = self._failed[_key(step)]
        history.append((failure.kind, flight.mode))
        return decide(failure, history, self._sites.choices(step.job, flight.site))

    def _repeat(self, run: JobRun, step: Step, retry: Retry, *, died: bool) -> None:
        if retry.mode in (RetryMode.LARGER, RetryMode.ROOMIER):
            self._sites.outgrew(run.index, retry.mode, run.node)
            self._restart(run)
            return
        if died:
            self._survey()
            if step.generation != run.generation:
                return
            if run.node not in self._sites.names:
                # The job's files are gone with its node.
                self._restart(run)
                return
        heapq.heappush(self._delayed, (self._clock() + retry.seconds, next(self._order), step, retry.mode))

    # ------------------------------------------------------------------------------------------ refusals

    def _refuse(self, run: JobRun, lines: Sequence[str]) -> None:
        self._fail(run, _infeasible(repr(run.job.model.id), lines or self._no_node))

    @property
    def _no_node(self) -> list[str]:
        return list(self._sites.shunned.values()) or ["no node of the cluster answers; start one"]

    def _refuse_rest(self) -> None:
        """Fail the jobs still queued when nothing runs: files of other jobs fill the disks."""
        most_free = max((site.room.free_disk for site in self._sites.all()), default=0)
        for index in sorted(self._sites.queued):
            run, disk = self.jobs[index], self._demands[index].disk
            message = (
                f"disk: {gigabytes(most_free)} left on the roomiest node by what this run wrote, expected at least "
                f"{gigabytes(disk)} for {run.job.model.id!r}; free some, and run the zoo again"
            )
            self._fail(run, Failure(kind=DiskFull.__name__, message=message))
        self._sites.queued.clear()

    def _fail(self, run: JobRun, failure: Failure) -> None:
        result = StageResult(stage=Stage.FETCH, failure=failure)
        run.node = ""
        run.follow(run.first(), result, 1)
        for watcher in self.watchers:
            watcher.ended(run.job, run.first(), 1, result, None)
        self._let_go(run)


def _infeasible(what: str, lines: Sequence[str]) -> Failure:
    """The failure of what fits on no node; ``lines`` say what the nodes lack."""
    lines = list(dict.fromkeys(lines))
    message = f"INFEASIBLE: {len(lines)} problem(s) for {what}: {'; '.join(lines)}"
    return Failure(kind=PreflightError.__name__, message=message)


def _key(step: Step) -> Key:
    """Key for counting attempts; omits the generation, so that the count goes on when a job moves to another node."""
    return step.job, step.stage, step.recipe, step.part
