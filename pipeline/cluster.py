"""Ray, behind one small class: nodes and what they have, stages as tasks, results as they come."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.placement import Claim, Node
from pipeline.steps import NETWORK_STAGES, Step
from workers.environment import Facts, host_memory
from workers.errors import OutOfMemory, QuantmillError, WorkerDied, ZooError
from workers.job import Failure, Job, Stage, StageResult
from workers.pace import LocalPace


class Cluster:
    """A Ray cluster: the embedded local one, or one that runs at ``address``."""

    def __init__(self, address: str | None, workspace: Path) -> None:
        _set_up_environment(embedded=address is None)
        import ray

        self._ray = ray
        self._workspace = workspace
        self._flying: dict[Any, Step] = {}
        self._pace: Any = None
        try:
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                logging_level="ERROR",
                log_to_driver=False,
                configure_logging=False,
                **(_whole_machine() if address is None else {}),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address is None:
                raise QuantmillError(f"Ray doesn't start on this machine ({error}); see `quantmill doctor`") from error
            raise ZooError(f"--address: no Ray cluster there, got {address!r} ({error}); start one") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def nodes(self) -> list[Node]:
        """The nodes that are alive now."""
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

    def probe(self, nodes: Sequence[Node], environments: Iterable[str | None]) -> dict[str, dict[str | None, Facts]]:
        """What each node has, by node id and environment; what doesn't answer, or isn't built, is left out."""
        task = self._ray.remote(max_calls=1, max_retries=0)(_probe)
        calls = {
            (node.id, environment): task.options(num_cpus=0, **_pinned(node.id), **_inside(environment)).remote(
                str(self._workspace), node.gpus > 0
            )
            for node in nodes
            for environment in environments
        }
        facts: dict[str, dict[str | None, Facts]] = {}
        for (node_id, environment), call in calls.items():
            with suppress(self._ray.exceptions.RayError):
                facts.setdefault(node_id, {})[environment] = Facts.model_validate_json(self._ray.get(call))
        return facts

    def start(self, step: Step, job: Job, node: Node, claim: Claim, seconds: float) -> None:
        """Start a stage on a node, which ends it after so long; its process ends with it, Ray never repeats it."""
        if self._pace is None:
            # One for the run: the limits are the account's, whatever process spends them.
            limits = job.destination.limits if job.destination else None
            self._pace = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LocalPace).remote(limits)
        computing = step.stage not in NETWORK_STAGES
        call = self._ray.remote(max_calls=1, max_retries=0)(_run).options(
            name=f"{step.stage} {Path(job.model.id).name}" + (f" {step.recipe}" if step.recipe else ""),
            num_cpus=claim.cpus,
            num_gpus=claim.gpus,
            memory=claim.memory if node.memory else None,
            **_pinned(node.id),
            **_inside(job.orders[0].recipe.environment if computing else None),
        )
        told = job.model_copy(update={"lean": True}) if claim.alone else job
        sent = told.model_dump_json(), step.stage.value, step.recipe
        self._flying[call.remote(*sent, self._pace, seconds, node.cpus_per_stage if computing else 1)] = step

    def wait(self, seconds: float) -> list[tuple[Step, StageResult]]:
        """The steps that ended, waiting for the first at most so long."""
        if not self._flying:
            return []
        done, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=seconds)
        return [(step := self._flying.pop(call), self._collect(call, step)) for call in done]

    def _collect(self, call: Any, step: Step) -> StageResult:
        exceptions = self._ray.exceptions
        try:
            return StageResult.model_validate_json(self._ray.get(call))
        except exceptions.OutOfMemoryError as error:
            message = f"{step.stage}: the node ran out of host memory; use a larger one, or lower calibration.samples"
            failure = Failure(kind=OutOfMemory.__name__, message=message, traceback=str(error))
        except exceptions.RayTaskError as error:
            failure = Failure(kind=type(error.cause).__name__, message=str(error.cause), traceback=str(error))
        except exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            failure = Failure(kind=WorkerDied.__name__, message=f"{step.stage}: the worker died ({reason})")
        except ValueError as error:
            failure = Failure(kind=type(error).__name__, message=f"{step.stage}: unreadable answer ({error})")
        return StageResult(stage=step.stage, recipe=step.recipe, failure=failure)


def _set_up_environment(embedded: bool) -> None:
    """What Ray reads from the environment when it's imported or started."""
    os.environ["RAY_task_oom_retries"] = "0"  # noqa: SIM112 - Ray's own spelling
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if embedded and "RAY_AUTH_MODE" not in os.environ:
        # Left alone, a local start writes ~/.ray/auth_token, after which other clusters of this user demand it.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)


def _whole_machine() -> dict[str, Any]:
    """The embedded Ray lends all of the machine's memory but what its store takes, which holds next to nothing."""
    store = 128 * 1024**2
    return {"object_store_memory": store, "_memory": max(host_memory() - store, 1)}


def _inside(environment: str | None) -> dict[str, Any]:
    """Options of a task that runs in a prebuilt environment."""
    if environment is None:
        return {}
    from workers.environments import interpreter

    return {"runtime_env": {"py_executable": str(interpreter(environment))}}


def _pinned(node_id: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _probe(workspace: str, with_devices: bool) -> str:
    from workers.environment import probe

    return probe(Path(workspace), with_devices).model_dump_json()


class _SharedPace:
    """The run's pace, which an actor keeps, as a worker's process asks it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._own = LocalPace()

    def ask(self, hub: str, commit_to: str | None) -> float:
        """As ``Pace`` says; while the actor's node is gone, each process keeps to the usual limits by itself."""
        import ray

        try:
            return float(ray.get(self._actor.ask.remote(hub, commit_to)))
        except ray.exceptions.RayError:
            return self._own.ask(hub, commit_to)

    def pause(self, hub: str, seconds: float) -> None:
        """As ``Pace`` says; nobody waits for the answer."""
        self._actor.pause.remote(hub, seconds)


def _run(job: str, stage: str, recipe: str | None, pace: Any, seconds: float, threads: int) -> str:
    # Ray's own setting follows the share of the node; the bytes of an artifact mustn't.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from workers.run import run_stage

    told = Job.model_validate_json(job)
    return run_stage(told, Stage(stage), recipe, _SharedPace(pace), seconds=seconds).model_dump_json()
