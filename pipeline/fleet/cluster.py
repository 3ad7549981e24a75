"""Run stages on a Ray cluster: list and probe its nodes, start stages as tasks, collect their results."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, Self

from pipeline.fleet import phases
from pipeline.fleet.head import Head, connect
from pipeline.fleet.leases import Leases, LeaseTable
from pipeline.fleet.phases import Desk, passed_on
from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.steps import NETWORK_STAGES, Step
from workers.errors import ClusterLost, OutOfMemory, PreflightError, WorkerDied
from workers.machine import child
from workers.machine.card_share import SHARE
from workers.machine.failures import describe, of_a_process
from workers.machine.memory import MemoryWatch, host_memory
from workers.machine.phase import VARIABLE
from workers.machine.preflight import MachineFacts
from workers.machine.warm import Parents
from workers.run import StageRequest, run_stage
from workers.spec.job import Failure, Job, StageResult, stage_label
from workers.transfer.pace import LocalPace

# Calls after which a Ray process is replaced. Computing stages run in a child and leave nothing there; transfers may.
STAGES_OF_A_PROCESS, TRANSFERS_OF_A_PROCESS = 1000, 32
# Interval for looking up dead nodes: calls to a disconnected host fail after minutes, but Ray notices within seconds.
LOOK_SECONDS = 5.0
# Timeouts of calls to actors, of probing a node (an environment's first start takes a while), of closing parents, and
# of leaving a cluster whose head is gone.
ACTOR_SECONDS, PROBE_SECONDS, CLOSE_SECONDS, LOST_CLOSE_SECONDS = 60.0, 300.0, 5.0, 15.0
# Timeouts of the embedded Ray, about ten times Ray's defaults, which fit an idle machine: it shares its cores with
# other programs. A value that the operator has set in the environment takes precedence.
SLOW_START = {
    "RAY_raylet_start_wait_time_s": "300",  # else ray.init gives up after a fixed 30 s
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_py_gcs_connect_timeout_s": "300",
    "RAY_agent_register_timeout_ms": "600000",  # a node without its agents ends itself
    "RAY_worker_register_timeout_seconds": "600",  # a worker that imports for longer is killed, and started again
    "RAY_health_check_timeout_ms": "60000",
}
# Attempts to start the embedded Ray, and the pauses between them; none is made once STARTING_SECONDS have passed.
STARTS, START_PAUSES, STARTING_SECONDS = 3, (2.0, 10.0), 250.0


class Cluster:
    """A Ray cluster: an embedded local one, or a running one at ``address``.

    ``warm``: start the warm parent of this Python now, so that it imports while Ray starts and models are fetched.
    """

    def __init__(self, address: str | None, workspace: Path, warm: bool = False) -> None:
        self._parents: dict[str, Any] = {}  # by node: the actor that owns its warm parents
        # Warm parents of the embedded node; those of other nodes belong to an actor there.
        self._own = Parents() if address is None else None
        self._warm_first = warm
        if self._own and warm:
            self._own.address()
        _set_up_environment(embedded=address is None)
        import ray

        self._ray = ray
        self._workspace = workspace
        self._flying: dict[Any, tuple[Step, str]] = {}  # by call (Ray's reference): the step, and its node
        self._looked = 0.0
        self._interpreters: dict[tuple[str, str], str] = {}  # by node and environment
        self._pace: Any = None
        # What stages are at, by their labels, as of the last look; and the call that asks for it.
        self.phases: dict[str, str] = {}
        self._asked: Any = None
        self._asked_at = 0.0
        self._nodes: list[Node] = []
        self._memory = MemoryWatch()
        try:
            if address is None:
                _start_embedded()
            else:
                connect(address, _init)
            self._head = Head()
        except BaseException:
            self._end_parents()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without its head Ray may wait for long: then it ends with this process.
        closing = threading.Thread(target=self._close, name="end of Ray", daemon=True)
        closing.start()
        closing.join(LOST_CLOSE_SECONDS if self._head.lost else None)

    def _close(self) -> None:
        with suppress(Exception):  # whatever Ray raises, the run's results are known
            self._end_parents()
        with suppress(Exception):
            self._ray.shutdown()

    def _end_parents(self) -> None:
        """Close warm parents, so that they delete their files; Ray kills those that don't answer."""
        if self._own:
            self._own.close()
        closing = [actor.close.remote() for actor in self._parents.values()]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)

    def nodes(self) -> list[Node]:
        """The nodes that are alive now; while the head is silent, those that were.

        Raises:
            ClusterLost: Ray's head is gone.
        """
        self._head.check(at_once=True)
        if self._head.answers:
            self._nodes = self._list_nodes()
        return self._nodes

    def _list_nodes(self) -> list[Node]:
        return [
            Node(
                node["NodeID"],
                int(have.get("CPU", 0)),
                int(have.get("GPU", 0)),
                int(have.get("memory", 0)),
                node.get("Labels") or {},
            )
            for node in self._ray.nodes()
            if node["Alive"] and (have := node["Resources"])
        ]

    def probe(
        self, nodes: Sequence[Node], environments: Iterable[str | None]
    ) -> dict[str, dict[str | None, MachineFacts | str]]:
        """Facts of each node and environment, or why it is unusable; nodes that don't answer are left out."""
        named = [environment for environment in environments if environment is not None]
        if self._warm_first:
            for node in nodes:
                self._warm(node, None)
        facts_by_node: dict[str, dict[str | None, MachineFacts | str]] = {}
        calls: dict[tuple[str, str | None], Any] = {(node.id, None): self._look(node, None) for node in nodes}
        if named:
            # Check that each Python exists first: Ray retries one that doesn't start for minutes.
            task = self._ray.remote(max_calls=1, max_retries=0)(_interpreters)
            workspace = str(self._workspace)
            interpreter_calls = [
                (node, task.options(num_cpus=0, **_pinned(node.id)).remote(named, workspace)) for node in nodes
            ]
            for node, call in interpreter_calls:
                with suppress(self._ray.exceptions.RayError):
                    paths, answers = self._probed(call)
                    facts_by_node[node.id] = dict(answers)
                    self._interpreters |= {(node.id, name): path for name, path in paths.items()}
                    calls |= {(node.id, name): self._look(node, name) for name in paths if name not in answers}
        for (node_id, environment), call in calls.items():
            try:
                facts_by_node.setdefault(node_id, {})[environment] = MachineFacts.model_validate_json(
                    self._probed(call)
                )
            except self._ray.exceptions.RayError as error:
                if environment is not None:
                    facts_by_node[node_id][environment] = _does_not_start(environment, error)
        return facts_by_node

    def _probed(self, call: Any) -> Any:
        """What a probe returns; looks at the head meanwhile."""
        until = time.monotonic() + PROBE_SECONDS
        while not self._ray.wait([call], timeout=1.0)[0] and time.monotonic() < until:
            self._head.check()
        return self._ray.get(call, timeout=1.0)

    def _look(self, node: Node, environment: str | None) -> Any:
        task = self._ray.remote(max_calls=1, max_retries=0)(_probe)
        options = {"num_cpus": 0, **_pinned(node.id), **self._inside(node, environment)}
        return task.options(**options).remote(str(self._workspace), node.gpus > 0)

    def _inside(self, node: Node, environment: str | None) -> dict[str, Any]:
        """Ray options that run a task in a prebuilt environment of its node."""
        if environment is None:
            return {}
        return {"runtime_env": {"py_executable": shlex.quote(self._interpreters[node.id, environment])}}

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Start a stage on a node, with a deadline in seconds; Ray never retries it.

        Raises:
            ClusterLost: Ray's head is gone.
        """
        self._head.wait()
        if self._pace is None:
            # One pace (rate limiter) for the run: the Hub's limits apply to the account, over all processes.
            limits = job.destination.limits if job.destination else None
            self._pace = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Desk).remote(limits)
        environment = job.orders[0].recipe.environment
        python = self._interpreters[node.id, environment] if environment else None
        # Start the warm parent early: it imports while the model is fetched.
        warm = self._warm(node, python)
        computing = step.stage not in NETWORK_STAGES
        stage, more = self.stage(step)
        calls = STAGES_OF_A_PROCESS if computing else TRANSFERS_OF_A_PROCESS
        call = self._ray.remote(max_calls=calls, max_retries=0)(stage).options(
            name=stage_label(step.stage, step.part, job.model, step.recipe),
            num_cpus=claim.cpus,
            num_gpus=claim.gpus,
            memory=claim.memory if node.memory else None,
            **_pinned(node.id),
        )
        sent = job.model_copy(update={"lean": True}) if claim.alone else job
        request = StageRequest(job=sent, stage=step.stage, recipe=step.recipe, part=step.part, seconds=seconds)
        cards = _cards_of(claim, embedded=self._own is not None)
        where = Where(self._pace, python, node.cpus_per_stage if computing else 1, cards, claim.gpus)
        self._flying[call.remote(request.model_dump_json(), where, warm, *more)] = step, node.id

    def stage(self, step: Step) -> tuple[Callable[..., str], tuple[Any, ...]]:
        """The function that runs a step on its node, and its additional arguments."""
        return (transfer if step.stage in NETWORK_STAGES else compute), ()

    def _warm(self, node: Node, python: str | None) -> Any:
        """``Parents.address`` of an interpreter on a node, or a Ray reference to it; starts the actor if needed."""
        if self._own:
            return self._own.address(python)
        if node.id not in self._parents:
            actor = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Parents)
            self._parents[node.id] = actor.options(**_pinned(node.id)).remote()
        return self._parents[node.id].address.remote(python)

    def leases(self) -> Leases:
        """The leases of all drivers of this cluster, kept in a detached actor that outlives them."""
        table = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LeaseTable)
        options = {"name": "quantmill-leases", "namespace": "quantmill", "lifetime": "detached", "get_if_exists": True}
        return _SharedLeases(table.options(**options).remote())

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """The steps that ended, after waiting at most ``seconds`` for the first.

        Raises:
            ClusterLost: Ray's head is gone.
        """
        self._head.check()
        if not self._flying:
            return []
        self._look_at_phases()
        done, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=seconds)
        ended = [(step := self._flying.pop(call)[0], self._collect(call, step)) for call in done]
        if time.monotonic() - self._looked > LOOK_SECONDS and self._head.answers:
            self._looked = time.monotonic()
            alive = {node.id for node in self.nodes()}
            for call in [call for call, (_, node) in self._flying.items() if node not in alive]:
                step, node = self._flying.pop(call)
                failure = Failure(kind=WorkerDied.__name__, message=f"{step.stage}: its node is gone ({node[:12]})")
                ended.append((step, StageResult(stage=step.stage, recipe=step.recipe, failure=failure)))
        return ended

    def _look_at_phases(self) -> None:
        """Take what the desk answered, and ask it again; never waits."""
        if self._asked is not None and self._ray.wait([self._asked], timeout=0)[0]:
            with suppress(self._ray.exceptions.RayError):
                said = self._ray.get(self._asked)
                self.phases.clear()
                self.phases.update(said)
            self._asked = None
        if self._asked is None and self._pace is not None and time.monotonic() - self._asked_at > phases.EVERY_SECONDS:
            self._asked, self._asked_at = self._pace.phases.remote(), time.monotonic()

    def _collect(self, call: Any, step: Step) -> StageResult:
        exceptions = self._ray.exceptions
        try:
            return StageResult.model_validate_json(self._ray.get(call))
        except exceptions.OutOfMemoryError as error:
            message = f"{step.stage}: the node ran out of host memory; use a larger one, or lower calibration.samples"
            failure = Failure(kind=OutOfMemory.__name__, message=message, traceback=str(error))
        except exceptions.RayTaskError as error:
            failure = describe(error.cause or error).model_copy(update={"traceback": str(error)[-8000:]})
        except exceptions.RayError as error:
            failure = self._lost(step, error)
        except ValueError as error:
            failure = Failure(kind=type(error).__name__, message=f"{step.stage}: unreadable answer ({error})")
        return StageResult(stage=step.stage, recipe=step.recipe, failure=failure)

    def _lost(self, step: Step, error: Exception) -> Failure:
        """The failure of a stage whose Ray process is gone; on this machine the kernel says whether memory was why."""
        watch, self._memory = self._memory, MemoryWatch()
        reason = str(error).strip().splitlines()[0]
        crashed = self._own is not None and isinstance(error, self._ray.exceptions.WorkerCrashedError)
        memory = watch.why(-signal.SIGKILL) if crashed and watch.grew else None
        known = of_a_process(step.stage, child.Ended(-signal.SIGKILL, reason, memory=memory))
        return Failure(kind=type(known).__name__, message=str(known))


def _set_up_environment(embedded: bool) -> None:
    """Set the environment variables that Ray reads when it is imported or started."""
    os.environ["RAY_task_oom_retries"] = "0"  # noqa: SIM112 - Ray's own spelling
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if embedded and "RAY_AUTH_MODE" not in os.environ:
        # By default a local start writes ~/.ray/auth_token, which other clusters of this user then require.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    if embedded:
        for name, value in SLOW_START.items():
            os.environ.setdefault(name, value)


def _start_embedded() -> None:
    """Start Ray on this machine, however slow that is.

    Raises:
        ClusterLost: it doesn't start.
    """
    begun = time.monotonic()
    for attempt in range(STARTS):
        try:
            _init("local", include_dashboard=False, **_whole_machine())
            return
        except BaseException as error:  # Ray raises bare ones
            _end_half_started(error)
            if not isinstance(error, Exception):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            if attempt == STARTS - 1 or time.monotonic() - begun > STARTING_SECONDS:
                raise ClusterLost(
                    f"Ray doesn't start on this machine, tried {attempt + 1} times ({reason}); see `quantmill doctor`, "
                    "and Ray's own logs in /tmp/ray/session_latest/logs"
                ) from error
            print(f"Ray didn't start ({reason}); trying again", file=sys.stderr, flush=True)
            time.sleep(START_PAUSES[attempt])


def _init(address: str, **more: Any) -> None:
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False, configure_logging=False, **more)


def _end_half_started(error: BaseException) -> None:
    """End the processes that a failed start left running; only its traceback's frames still refer to Ray's node."""
    import ray
    from ray._private.node import Node as RayNode

    ray.shutdown()
    for frame, _ in walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, RayNode) and hasattr(node, "all_processes"):
            node.kill_all_processes(check_alive=False, allow_graceful=True)
            return


def _whole_machine() -> dict[str, Any]:
    """Options for the embedded Ray: its store is small (bytes), and all other memory is for stages."""
    store = 128 * 1024**2
    return {"object_store_memory": store, "_memory": max(host_memory() - store, 1)}


def _interpreters(names: list[str], workspace: str) -> tuple[dict[str, str], dict[str, MachineFacts | str]]:
    """Interpreters of the usable environments, and the answers known without Ray: why one isn't usable, or the facts of
    one that has no Ray, for only a runtime's check runs there."""
    from pipeline.doctor import facts
    from workers.machine.environments import interpreters, runs_stages

    usable, problems = interpreters(names)
    answers: dict[str, MachineFacts | str] = dict(problems)
    for name, python in usable.items():
        if not runs_stages(name):
            try:
                answers[name] = facts(python, Path(workspace))
            except PreflightError as error:
                answers[name] = str(error)
    return usable, answers


def _does_not_start(environment: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"environment {environment!r} doesn't start ({reason}); run `quantmill env remove {environment}` there, and "
        f"`quantmill env create {environment}`"
    )


def _pinned(node_id: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _probe(workspace: str, with_devices: bool) -> str:
    from workers.machine.preflight import probe

    return probe(Path(workspace), with_devices).model_dump_json()


class _SharedLeases:
    """Client of the actor that keeps the leases."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def take(self, owner: str, keys: Sequence[str]) -> bool:
        """See ``Leases``. True if the actor doesn't answer: publishing is idempotent, so making it twice is safe."""
        import ray

        try:
            return bool(ray.get(self._actor.take.remote(owner, keys), timeout=ACTOR_SECONDS))
        except ray.exceptions.RayError:
            return True

    def drop(self, owner: str, keys: Sequence[str]) -> None:
        """See ``Leases``; doesn't wait for the actor."""
        self._actor.drop.remote(owner, keys)


class _SharedPace:
    """Client of the actor that keeps the run's pace (rate limiter)."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._own = LocalPace()

    def ask(self, hub: str, commit_to: str | None, file: bool = False) -> float:
        """See ``Pace``. If the actor doesn't answer, this process applies the default limits by itself."""
        import ray

        try:
            return float(ray.get(self._actor.ask.remote(hub, commit_to, file), timeout=ACTOR_SECONDS))
        except ray.exceptions.RayError:
            return self._own.ask(hub, commit_to, file)

    def pause(self, hub: str, seconds: float) -> None:
        """See ``Pace``; doesn't wait for the actor."""
        self._actor.pause.remote(hub, seconds)


def _cards_of(claim: Claim, *, embedded: bool) -> str | None:
    """CUDA_VISIBLE_DEVICES of a stage's process: none for a claim without a GPU, which Ray lets see them all.

    The embedded Ray's cards are this driver's alone, so the claim's own are taken: one that is set aside stays unused.
    In a cluster that others share, Ray chooses (None).
    """
    if not claim.gpus:
        return ""
    if not embedded:
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(visible[card] if card < len(visible) else str(card) for card in claim.cards)


@dataclass(frozen=True)
class Where:
    """Context of a stage on its node: the run's pace (an actor), its Python, its number of threads, and its cards.

    ``cards`` is CUDA_VISIBLE_DEVICES of its process; None: what Ray has set. ``share`` is the part of its card that it
    may use; 0, 1 and more: all of it, and of others.
    """

    pace: Any
    python: str | None
    threads: int
    cards: str | None = None
    share: float = 0.0

    def ask(self, entry: str, request: str, warm: tuple[str | None, str | None], phase: str = "") -> child.Ended:
        """Run ``entry`` in a fresh process, forked from the warm parent at ``warm`` if there is one.

        ``phase``: path of the file in which it says what it is at; empty: nobody asks.
        """
        address, note = warm
        # Ray sets threads by the task's share of the node; an artifact's bytes must not depend on that.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), VARIABLE: phase}
        environment[SHARE] = f"{self.share:.6f}" if 0 < self.share < 1 else ""
        if self.cards is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.cards
        ended = child.run(entry, request, python=self.python, warm=address, environment=environment)
        return replace(ended, note=ended.note or note)


def transfer(request: str, where: Where, warm: tuple[str | None, str | None]) -> str:
    """Run a stage that transfers files, in this Ray process, which can reach the run's pace."""
    stage_request = StageRequest.model_validate_json(request)
    pace = _SharedPace(where.pace)
    return run_stage(
        stage_request.job, stage_request.stage, stage_request.recipe, pace, seconds=stage_request.seconds
    ).model_dump_json()


def compute(request: str, where: Where, warm: tuple[str | None, str | None]) -> str:
    """Run a stage that computes, in a fresh process, whose end frees host and GPU memory."""
    stage_request = StageRequest.model_validate_json(request)
    label = stage_label(stage_request.stage, stage_request.part, stage_request.job.model, stage_request.recipe)
    try:
        with passed_on(where.pace, label) as phase:
            ended = where.ask("workers.run:answer", request, warm, phase)
    except (FileNotFoundError, PermissionError) as error:
        raise PreflightError(
            f"{stage_request.stage}: {where.python} doesn't start any more ({error}); build it anew"
        ) from error
    print(ended.stderr, end="", file=sys.stderr)
    if ended.answer is not None:
        result = StageResult.model_validate_json(ended.answer)
    else:
        known = of_a_process(stage_request.stage, ended)
        failure = Failure(kind=type(known).__name__, message=str(known), traceback=ended.stderr[-8000:])
        result = StageResult(stage=stage_request.stage, recipe=stage_request.recipe, failure=failure)
    return result.model_copy(update={"notes": (ended.note,) if ended.note else ()}).model_dump_json()
