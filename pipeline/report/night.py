"""What a report tells of a run: what went wrong and what to do, what changed since the run before, and how nights went.

All of it is read from the run's folder and its neighbours: ``results.json`` and ``log.jsonl``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from pipeline.report.logbook import LOG
from pipeline.report.results import ArtifactEntry, Results

RESULTS = "results.json"
# Nights of the same zoo that the history shows.
NIGHTS = 30
BAD = ("failed", "rejected")
MADE = ("published", "verified")
# Lines of a traceback that are shown.
EXCERPT = 6
# A change of KL that is worth a word: half as much again, or less than two thirds.
NOTABLE = 1.5


@dataclass(frozen=True)
class Step:
    """A stage that ended: from when to when (seconds since the epoch), where, and with which error."""

    model: str
    recipe: str | None
    stage: str
    node: str
    began: float
    ended: float
    attempt: int
    error: str | None
    traceback: str | None


@dataclass(frozen=True)
class Problem:
    """Artifacts that failed, or were rejected, for one reason; and what to do about it."""

    status: str
    kind: str
    sentence: str
    artifacts: tuple[ArtifactEntry, ...]
    stage: str
    nodes: tuple[str, ...]
    attempts: int
    excerpt: str
    files: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Change:
    """What is otherwise than in the run before: of which kind, and how to say it of each artifact."""

    kind: str
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class NightRow:
    """One run of the same zoo in few numbers."""

    run_id: str
    started_at: str
    status: str
    made: int
    skipped: int
    bad: int
    hours: float
    kl_median: float | None


@dataclass(frozen=True)
class Night:
    """A run with its log, the run of the same zoo before it, and how those before went, the oldest first."""

    results: Results
    steps: tuple[Step, ...] = ()
    before: Results | None = None
    history: tuple[NightRow, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What failed or was rejected, those with the most artifacts first."""
        groups: dict[tuple[str, str, str], list[ArtifactEntry]] = {}
        for one in self.results.artifacts:
            if one.status in BAD:
                kind = one.error.kind if one.error else str(one.outcome or one.status)
                groups.setdefault((one.status, kind, _alike(one)), []).append(one)
        found = [self._problem(status, kind, group) for (status, kind, _), group in groups.items()]
        return tuple(sorted(found, key=lambda problem: (problem.status, -len(problem.artifacts))))

    @property
    def changes(self) -> tuple[Change, ...]:
        """What is otherwise than in the run before; nothing if there is none."""
        return compared(self.before, self.results) if self.before else ()

    def _problem(self, status: str, kind: str, group: Sequence[ArtifactEntry]) -> Problem:
        first = group[0]
        about = {(one.model, one.recipe) for one in group} | {(one.model, None) for one in group}
        steps = [step for step in self.steps if step.error and (step.model, step.recipe) in about]
        last = steps[-1] if steps else None
        return Problem(
            status=status,
            kind=kind,
            sentence=(first.error.message if first.error else first.reason) or "no reason was given",
            artifacts=tuple(group),
            stage=last.stage if last else "verify" if status == "rejected" else "plan",
            nodes=tuple(dict.fromkeys(step.node for step in steps if step.node)),
            attempts=max(one.attempts for one in group),
            excerpt=_excerpt(last.traceback if last else None),
            files=tuple(one.path for one in group if one.path)[:3],
            command=_next(first, kind),
        )


def about(results: Results, folder: Path) -> Night:
    """A run whose results are known, with what its folder and its neighbours tell."""
    earlier = _earlier(results, folder)
    rows = tuple(map(_row, (*earlier, results)))
    return Night(results, tuple(_steps(folder / LOG)), earlier[-1] if earlier else None, rows)


def compared(before: Results, now: Results) -> tuple[Change, ...]:
    """What differs between two runs, artifact by artifact; empty kinds are left out."""
    old = {_key(one): one for one in before.artifacts}
    new = {_key(one): one for one in now.artifacts}
    both = [(old[key], one) for key, one in new.items() if key in old]
    kinds: dict[str, list[str]] = {
        "newly failing": [_named(b) for a, b in both if b.status in BAD and a.status not in BAD],
        "mended": [_named(b) for a, b in both if a.status in BAD and b.status not in BAD],
        "still failing": [_named(b) for a, b in both if a.status in BAD and b.status in BAD],
        "made anew": [_named(b) for a, b in both if b.status in MADE and a.fingerprint not in ("", b.fingerprint)],
        "farther from its source": [_drift(a, b) for a, b in both if _ratio(a, b) >= NOTABLE],
        "nearer to its source": [_drift(a, b) for a, b in both if 0 < _ratio(a, b) <= 1 / NOTABLE],
        "new": [_named(one) for key, one in new.items() if key not in old],
        "no longer in the zoo": [_named(one) for key, one in old.items() if key not in new],
    }
    return tuple(Change(kind, tuple(names)) for kind, names in kinds.items() if names)


def recommended(artifacts: Iterable[ArtifactEntry], most: float) -> ArtifactEntry | None:
    """The smallest accepted artifact that loses at most ``most`` nats, else the accepted one that loses least."""
    fine = [one for one in artifacts if one.metrics and one.bytes and one.status not in BAD]
    near = [one for one in fine if one.metrics and one.metrics.kl_mean <= most]
    if near:
        return min(near, key=lambda one: one.bytes)
    return min(fine, key=lambda one: one.metrics.kl_mean if one.metrics else 0.0, default=None)


def frontier(artifacts: Iterable[ArtifactEntry]) -> list[ArtifactEntry]:
    """The accepted artifacts that no smaller or equal one is nearer to the source than, by size."""
    fine = [one for one in artifacts if one.metrics and one.bytes and one.status not in BAD]
    found: list[ArtifactEntry] = []
    for one in sorted(fine, key=lambda one: (one.bytes, one.metrics.kl_mean if one.metrics else 0.0)):
        if not found or _kl(one) < _kl(found[-1]):
            found.append(one)
    return found


# ------------------------------------------------------------------------------------------- reading


def _earlier(results: Results, folder: Path) -> list[Results]:
    """The runs of the same zoo before this one, the oldest first."""
    found: list[Results] = []
    names = sorted((path.parent.name for path in folder.parent.glob(f"*/{RESULTS}")), reverse=True)
    for name in names:
        if name == folder.name or len(found) == NIGHTS - 1:
            continue
        try:
            one = Results.model_validate_json((folder.parent / name / RESULTS).read_text())
        except (OSError, ValidationError):
            continue
        if one.zoo == results.zoo and one.started_at < results.started_at:
            found.append(one)
    return sorted(found, key=lambda one: one.started_at)


def _steps(path: Path) -> Iterable[Step]:
    """The stages of a log that ended; lines that a crash has cut are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry.get("event") not in ("ended", "failed"):
                continue
            ended, failed = datetime.fromisoformat(entry["time"]).timestamp(), entry.get("failed") or ()
            yield Step(
                model=entry["model"],
                recipe=entry.get("recipe"),
                stage=entry["stage"],
                node=entry.get("node", ""),
                began=ended - float(entry.get("seconds") or 0.0),
                ended=ended,
                attempt=int(entry.get("attempt", 0)),
                error=entry.get("error") or "; ".join(f"{one['recipe']}: {one['error']}" for one in failed) or None,
                traceback=entry.get("traceback") or next((one.get("traceback") for one in failed), None),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _row(results: Results) -> NightRow:
    statuses = [one.status for one in results.artifacts]
    kls = sorted(one.metrics.kl_mean for one in results.artifacts if one.metrics and one.status not in BAD)
    stages = ("fetch", "quantize", "keep", "verify", "publish")
    jobs = sum(getattr(job.seconds, stage) for job in results.jobs for stage in stages)
    return NightRow(
        run_id=results.run_id,
        started_at=results.started_at,
        status=results.status,
        made=sum(status in MADE for status in statuses),
        skipped=statuses.count("skipped"),
        bad=sum(status in BAD for status in statuses),
        hours=jobs / 3600,
        kl_median=kls[len(kls) // 2] if kls else None,
    )


# ------------------------------------------------------------------------------------------- words


def _key(one: ArtifactEntry) -> tuple[str, str]:
    return one.model, one.recipe


def _named(one: ArtifactEntry) -> str:
    return f"{Path(one.model).name} {one.recipe}"


def _kl(one: ArtifactEntry) -> float:
    return one.metrics.kl_mean if one.metrics else 0.0


def _ratio(before: ArtifactEntry, now: ArtifactEntry) -> float:
    """KL now over KL before; 1 where one has none, or is broken."""
    known = before.metrics and now.metrics and before.status not in BAD and now.status not in BAD
    return _kl(now) / max(_kl(before), 1e-9) if known else 1.0


def _drift(before: ArtifactEntry, now: ArtifactEntry) -> str:
    return f"{_named(now)} (KL {_kl(before):.2g} to {_kl(now):.2g})"


def _alike(one: ArtifactEntry) -> str:
    """A reason without the names in which it differs between models."""
    said = (one.error.message if one.error else one.reason) or ""
    for name in (one.model, Path(one.model).name, one.recipe):
        said = said.replace(name, "…")
    return "".join("0" if letter.isdigit() else letter for letter in said)


def _excerpt(traceback: str | None) -> str:
    lines = [line for line in (traceback or "").splitlines() if line.strip()]
    return "\n".join(lines[-EXCERPT:])


def _next(one: ArtifactEntry, kind: str) -> str:
    """The command that comes next."""
    if one.status == "rejected" and one.path:
        return f"quantmill verify {shlex.quote(one.path)} --reference {shlex.quote(one.model)}"
    if kind in ("PreflightError", "InfeasibleError"):
        return f"quantmill doctor {shlex.quote(one.recipe)}"
    if kind in ("UnsupportedModel", "UnsupportedRecipe", "CheckpointError", "ModelNotFound", "ZooError"):
        return "quantmill plan ZOO"
    return "quantmill run ZOO"
