"""Nights that went as they might: results and logs of runs that nobody made, for reports to be tried on."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.report.logbook import LOG
from pipeline.report.night import RESULTS
from pipeline.report.results import ArtifactEntry, ErrorEntry, JobEntry, MetricsEntry, Results, Seconds
from workers.spec.job import ExpertTokens, Outcome, PeakMemory

RECIPES = {"gptq-w4-g128": (0.28, 0.012), "bnb-nf4": (0.29, 0.02), "fp8-dynamic": (0.52, 0.001)}
TRACE = 'Traceback (most recent call last):\n  File "one_pass.py", line 7, in solve\nMemoryError'
FAULTS: dict[int, dict[str, Any]] = {
    7: {
        "status": "failed",
        "kind": "OutOfMemory",
        "message": "quantize: the node ran out of memory; use a larger one",
    },
    40: {
        "status": "failed",
        "kind": "HubUnavailable",
        "message": "publish: 503 for 20 minutes; run the zoo again",
    },
    99: {"status": "rejected", "kind": "", "message": "KL divergence 0.31 (bound 0.34), expected at most 0.05"},
}


TOKENS = ExpertTokens(layer=3, experts=8, least=6, median=126, most=961)


def write(
    out: Path,
    models: int,
    *,
    number: int = 0,
    faults: dict[int, dict[str, Any]] | None = None,
    drifted: int | None = None,
) -> Path:
    """Write a run's folder: the ``number``-th night of the zoo.

    ``faults`` by the number of the model, and the model whose artifacts are twice as far from it as before.
    """
    dice = random.Random(models)
    begun = datetime(2026, 11, 1, 22, tzinfo=UTC) + timedelta(days=number)
    artifacts, jobs, lines, clocks = [], [], [], dict.fromkeys((f"gpu-{index}" for index in range(8)), 0.0)
    for index in range(models):
        model, node = f"acme/model-{index:03}", min(clocks, key=lambda name: clocks[name])
        size, fault = int(dice.uniform(1e9, 16e9)), (faults or {}).get(index)
        for place, (recipe, (share, kl)) in enumerate(RECIPES.items()):
            bad = fault if place == 0 else None
            took = dice.uniform(20, 200)
            own = kl * random.Random(model).uniform(0.7, 1.4) * (2 if index == drifted else 1)
            artifacts.append(_artifact(model, recipe, int(size * share), size, own, bad, dice))
            for stage, seconds in (("quantize", took), ("verify", took / 2), ("publish", 5.0)):
                clocks[node] += seconds
                fails = bad is not None and stage == ("publish" if "publish" in bad["message"] else "quantize")
                lines.append(
                    {
                        "time": (begun + timedelta(seconds=clocks[node])).isoformat(timespec="seconds"),
                        "event": "failed" if fails else "ended",
                        "model": model,
                        "recipe": recipe if stage != "quantize" else None,
                        "stage": stage,
                        "attempt": 1,
                        "node": node,
                        "seconds": seconds,
                        **({"error": bad["message"], "traceback": TRACE} if bad and fails else {}),
                    }
                )
        took_all = Seconds(quantize=300, verify=90)
        jobs.append(JobEntry(model=model, revision="a" * 40, recipes=tuple(RECIPES), node=node, seconds=took_all))
    results = Results(
        run_id=f"{begun:%Y%m%d}-220000-nightly-{number:04}",
        zoo="nightly",
        started_at=begun.isoformat(timespec="seconds"),
        finished_at=(begun + timedelta(seconds=max(clocks.values()))).isoformat(timespec="seconds"),
        status="failed" if faults else "ok",
        jobs=tuple(jobs),
        artifacts=tuple(artifacts),
        calibration="set general: 512 sequences of 2048 tokens",
    )
    folder = out / results.run_id
    folder.mkdir(parents=True)
    (folder / RESULTS).write_text(results.model_dump_json())
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _artifact(
    model: str, recipe: str, size: int, source: int, kl: float, fault: dict[str, Any] | None, dice: random.Random
) -> ArtifactEntry:
    rejected = fault is not None and fault["status"] == "rejected"
    made = fault is None or rejected
    return ArtifactEntry(
        model=model,
        revision="a" * 40,
        recipe=recipe,
        fingerprint="f" * 64,
        status=fault["status"] if fault else "published",
        reason=fault["message"] if fault else None,
        path=f"/runs/artifacts/{model}-{recipe}" if made else None,
        repo_id=f"{model}-{recipe}",
        commit=None if fault else "c" * 40,
        metrics=MetricsEntry(
            perplexity=9.1,
            reference_perplexity=9.0,
            kl_mean=0.31 if rejected else kl,
            kl_p99=kl * 9,
            top1_agreement=0.96,
            eval_tokens=16384,
        )
        if made
        else None,
        runtime=None,
        bytes=size if made else 0,
        reference_bytes=source,
        seconds=Seconds(quantize=dice.uniform(1, 60), verify=dice.uniform(10, 90)),
        peak_memory_bytes=PeakMemory(host=int(4e9), device=0),
        fallbacks=(),
        attempts=3 if fault else 1,
        error=ErrorEntry(kind=fault["kind"], message=fault["message"]) if fault and not rejected else None,
        outcome=Outcome.REGRESSION if rejected else Outcome.ACCEPT,
        worst_layers=(("model.layers.3.mlp.down_proj.weight", 21.4),),
        expert_tokens=(ExpertTokens(layer=3, experts=8, least=6, median=126, most=961),)
        if recipe.startswith("gptq")
        else (),
        layer_noise=(None, *(round(20 + 10 * dice.random(), 2) for _ in range(31))) if made else (),
    )


def artifacts_of(points: list[tuple[int, float]]) -> list[ArtifactEntry]:
    """Published artifacts of these sizes in bytes and KL in nats."""
    dice = random.Random(0)
    return [
        _artifact("acme/model", f"recipe-{index}", size, 10, kl, None, dice) for index, (size, kl) in enumerate(points)
    ]
