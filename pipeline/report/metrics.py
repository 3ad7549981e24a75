"""Export a run's metrics through Ray's metrics endpoint, for Prometheus and Ray's dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.fleet.scheduler import Pulse
from pipeline.fleet.steps import Step
from workers.spec.job import Job, Stage, StageResult

SECONDS = [1.0, 10.0, 60.0, 300.0, 1200.0, 3600.0, 4 * 3600.0, 12 * 3600.0]


class PrometheusMetrics:
    """Counts stages that end; ``pulse`` gives the fleet's current state. Needs a driver connected to Ray."""

    def __init__(self, zoo: str, pulse: Callable[[], Pulse]) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._zoo, self._pulse = zoo, pulse

        def gauge(name: str, description: str, *tags: str) -> Any:
            return Gauge(f"quantmill_{name}", description=description, tag_keys=("zoo", *tags))

        self._seconds = Histogram(
            "quantmill_stage_seconds",
            description="Seconds that a stage took.",
            boundaries=SECONDS,
            tag_keys=("zoo", "stage", "outcome"),
        )
        self._failures = Counter(
            "quantmill_stage_failures", description="Stages that failed, by error.", tag_keys=("zoo", "stage", "error")
        )
        self._bytes = Counter(
            "quantmill_artifact_bytes", description="Bytes of artifacts that were made.", tag_keys=("zoo",)
        )
        self._running = gauge("running_stages", "Stages at work.", "stage")
        self._queued = gauge("queued_jobs", "Models that no node has been given yet.")
        self._busy = gauge("gpu_busy_share", "Share of the GPUs that stages hold, 0 to 1.")

    def started(self, job: Job, step: Step, attempt: int) -> None:
        """Update the gauges when a stage is handed to a node."""
        self._measure()

    def ended(self, job: Job, step: Step, attempt: int, result: StageResult, retry_in: float | None) -> None:
        """Count a stage's seconds, failure and artifact bytes when it ends."""
        tags = {"zoo": self._zoo, "stage": step.stage.value}
        self._seconds.observe(result.seconds, {**tags, "outcome": "failed" if result.failure else "ok"})
        if result.failure:
            self._failures.inc(1, {**tags, "error": result.failure.kind})
        if artifact_bytes := sum(artifact.bytes for artifact in result.artifacts):
            self._bytes.inc(artifact_bytes, {"zoo": self._zoo})
        self._measure()

    def _measure(self) -> None:
        pulse, zoo = self._pulse(), {"zoo": self._zoo}
        for stage in Stage:
            self._running.set(pulse.running.get(stage, 0), {**zoo, "stage": stage.value})
        self._queued.set(pulse.queued, zoo)
        if pulse.gpus:
            self._busy.set(pulse.busy_gpus / pulse.gpus, zoo)
