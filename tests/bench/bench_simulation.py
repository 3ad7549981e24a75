"""10,000 models on 1,000 GPUs of three kinds, with nodes that fail: the driver's own decisions, in virtual time.

python -m tests.bench.bench_simulation [--models N] [--plot FILE]

What is assumed: models of 0.5 to 120 billion weights (log-normal, median 7), three recipes each; a GPU's speed; stages
that take 0.8 to 1.3 times their estimate; 1 GB/s to and from a Hub for a node. Nodes fail as often as was published
(Kokolis et al., arXiv 2410.21680: 6.5 failures in a thousand node-days), and ten and a hundred times as often; a failed
node is back after two hours, empty. Further, 0.5 % of stages end in an error that is worth another try.
"""

from __future__ import annotations

import argparse
import random
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.fleet.placement import Claim, Node
from pipeline.fleet.steps import NETWORK_STAGES, Step
from pipeline.planning.sizing import Estimate, Need
from tests.bench import models
from tests.pipeline.simulated import GIB, SimulatedFleet, drive, node, plan_of
from workers.spec.job import Failure, Job, Stage

RECIPES = ("gptq-w4-g128", "awq-w4-g128", "fp8-dynamic")
FAILURES_IN_A_NODE_DAY = 6.5 / 1000
REPAIR_SECONDS = 2 * 3600.0
TOKENS, HELD_OUT = 1_048_576, 262_144
# Kind, nodes of eight cards, GiB of a card, multiply-adds in a second that streaming reaches (assumed).
KINDS = (("large", 60, 80, 1.6e14), ("middle", 50, 48, 0.6e14), ("small", 15, 24, 0.3e14))
LINE = 1e9  # bytes in a second to and from the Hub, for a node


@dataclass(frozen=True)
class Outcome:
    """What came of one simulated night."""

    hours: float
    bound: float
    busy: list[tuple[float, float]]  # hour, share of the GPUs' speed at work
    lost: float  # share of GPU seconds whose work was done again
    failures: int
    made: int
    utilisation: float  # until the last stage was handed out
    decisions: float  # seconds of real time


def sizes(count: int) -> list[Estimate]:
    """Estimates of models of all sizes; what a card needs is that of a few layers, whatever the depth."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        weights = min(1.2e11, max(5e8, 7e9 * draw.lognormvariate(0, 1.2)))
        layer = weights / max(16, min(96, round((weights / 1e6) ** 0.42)))
        need = Need(int(4 * GIB + 8 * layer), int(2 * GIB + 10 * layer))
        found.append(
            Estimate(
                source_bytes=int(2 * weights), artifact_bytes=int(0.6 * weights), quantize=need, verify=need,
                pass_work=int(weights * (TOKENS + HELD_OUT)), own_work=int(weights * HELD_OUT),
            )
        )  # fmt: skip
    return found


def stage_seconds(step: Step, size: Estimate, rate: float) -> float:
    """How long a stage takes at so many multiply-adds in a second: 0.8 to 1.3 times its estimate, always the same."""
    drawn = zlib.crc32(f"{step.job} {step.stage} {step.recipe}".encode()) / 2**32
    jitter = 0.8 + 0.5 * drawn
    if step.stage == Stage.FETCH:
        return 5 + size.source_bytes / LINE * jitter
    if step.stage == Stage.PUBLISH:
        return 5 + size.artifact_bytes / LINE * jitter
    work = size.pass_work if step.stage == Stage.QUANTIZE else size.own_work
    return 20 + work / rate * jitter


def night(estimates: list[Estimate], how_often: float) -> Outcome:
    """One run of the driver in virtual time, with failures so many times as often as published."""
    draw = random.Random(1)
    speed = {kind: rate for kind, _, _, rate in KINDS}
    nodes = [node(f"{kind}-{index}", 128, gpus=8, gib=2048, kind=kind) for kind, n, _, _ in KINDS for index in range(n)]
    cards = {kind: gib for kind, _, gib, _ in KINDS}

    def seconds(step: Step, of: Job, at: Node) -> float:
        share = fleet.claims[step].gpus or 1.0
        return stage_seconds(step, estimates[step.job], speed[at.labels["kind"]] * share)

    def fails(step: Step, of: Job, at: Node, claim: Claim) -> Failure | None:
        return Failure(kind="WorkerDied", message="x") if draw.random() < 0.005 else None

    fleet = SimulatedFleet(
        nodes,
        seconds=seconds,
        fails=fails,
        disk=10**15,
        card_gib=lambda at: cards[at.labels["kind"]],
        processors=lambda at: round(speed[at.labels["kind"]] / 1e13),
    )
    failed = Counter[str]()

    def fail(at: Node) -> None:
        failed[at.id] += 1
        fleet.vanish(at.id)
        fleet.at(fleet.now + REPAIR_SECONDS, lambda: come_back(at))

    def come_back(at: Node) -> None:
        # Ray gives a node that returns another id.
        again = node(f"{at.id}'", at.cpus, gpus=at.gpus, gib=2048, kind=at.labels["kind"])
        fleet.alive[again.id] = again
        fleet.at(fleet.now + next_failure(), lambda: fail(again))

    def next_failure() -> float:
        return draw.expovariate(FAILURES_IN_A_NODE_DAY * how_often / 86_400)

    for each in nodes:
        fleet.at(next_failure(), lambda each=each: fail(each))  # type: ignore[misc]
    begun = time.perf_counter()
    driver = drive(fleet, plan_of(estimates, *RECIPES))
    decided = time.perf_counter() - begun
    commits = [artifact.commit for run in driver.jobs for artifact in run.artifacts.values()]
    return _outcome(fleet, estimates, speed, commits, sum(failed.values()), decided)


def _outcome(
    fleet: SimulatedFleet,
    estimates: list[Estimate],
    speed: dict[str, float],
    commits: list[str | None],
    failures: int,
    decided: float,
) -> Outcome:
    total = sum(8 * count * rate for _, count, _, rate in KINDS)
    open_, spans = dict[Step, list[float]](), list[tuple[float, float, float, Step]]()
    for when, event, at, step in fleet.log:
        if step.stage in NETWORK_STAGES:
            continue
        if event == "started":
            open_.setdefault(step, []).append(when)
        else:
            rate = speed[at.split("-")[0]] * fleet.claims[step].gpus
            spans.append((open_[step].pop(0), when, rate, step))
    done = max(end for _, end, _, _ in spans)
    last = max(begin for begin, _, _, _ in spans)
    held = sum((end - begin) * rate for begin, end, rate, _ in spans)
    useful = {step: (end - begin) * rate for begin, end, rate, step in sorted(spans, key=lambda span: span[1])}
    kept = Counter[tuple[int, Stage, str | None]]()
    for step, value in useful.items():
        kept[step.job, step.stage, step.recipe] = value  # type: ignore[assignment]
    bins, width = [0.0] * 200, done / 200
    for begin, end, rate, _ in spans:
        for index in range(int(begin / width), min(199, int(end / width)) + 1):
            overlap = min(end, (index + 1) * width) - max(begin, index * width)
            bins[index] += max(0.0, overlap) * rate / (width * total)
    until = sum((min(end, last) - begin) * rate for begin, end, rate, _ in spans)
    return Outcome(
        hours=done / 3600,
        bound=_bound(estimates) / 3600,
        busy=[((index + 0.5) * width / 3600, value) for index, value in enumerate(bins)],
        lost=1 - sum(kept.values()) / held,
        failures=failures,
        made=sum(commit is not None for commit in commits),
        utilisation=until / (total * last),
        decisions=decided,
    )


def _bound(estimates: list[Estimate]) -> float:
    """Seconds that no schedule beats, though every model would fit every card, and nothing failed.

    All work at the speed of all cards together, or the longest job from end to end on the fastest of them.
    """
    fastest, cards = max(rate for _, _, _, rate in KINDS), 8 * sum(count for _, count, _, _ in KINDS)
    total = 8 * sum(count * rate for _, count, _, rate in KINDS)
    work, starts, longest = 0.0, 0.0, 0.0
    for index, size in enumerate(estimates):
        fetch, one_pass = Step(index, Stage.FETCH), Step(index, Stage.QUANTIZE)
        verify = [Step(index, Stage.VERIFY, recipe) for recipe in RECIPES]
        publish = [Step(index, Stage.PUBLISH, recipe) for recipe in RECIPES]
        computing = [stage_seconds(step, size, fastest) for step in (one_pass, *verify)]
        work += sum(seconds - 20 for seconds in computing) * fastest
        starts += 20 * len(computing)
        last = max(a + stage_seconds(b, size, fastest) for a, b in zip(computing[1:], publish, strict=True))
        longest = max(longest, stage_seconds(fetch, size, fastest) + computing[0] + last)
    return max(work / total + starts / cards, longest)


def plot(outcomes: dict[float, Outcome], path: Path) -> None:
    """The share of the GPUs' speed that was at work, over the hours of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for how_often, outcome in outcomes.items():
        label = f"{how_often:g} x published failures: {outcome.hours:.1f} h, {outcome.failures} nodes lost"
        axes.plot(*zip(*outcome.busy, strict=True), label=label, linewidth=1.4)
    first = next(iter(outcomes.values()))
    axes.axvline(first.bound, color="0.5", linestyle=":", label=f"lower bound: {first.bound:.1f} h")
    axes.set(xlabel="hours", ylabel="GPUs at work, by speed", ylim=(0, 1.05), xlim=(0, None))
    axes.set_title("10,000 models x 3 recipes on 1,000 GPUs of three kinds (simulated)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--plot", type=Path, default=Path("docs/simulation.png"))
    arguments = parser.parse_args()
    print(models.machine())
    estimates = sizes(arguments.models)
    outcomes = {}
    print("| failures | nodes lost | hours | lower bound | ratio | busy | work lost | artifacts | decisions, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for how_often in (1.0, 10.0, 100.0):
        outcome = outcomes[how_often] = night(estimates, how_often)
        print(
            f"| {how_often:g} x | {outcome.failures} | {outcome.hours:.2f} | {outcome.bound:.2f} | "
            f"{outcome.hours / outcome.bound:.3f} | {outcome.utilisation:.1%} | {outcome.lost:.2%} | "
            f"{outcome.made} of {3 * arguments.models} | {outcome.decisions:.1f} |",
            flush=True,
        )
    plot(outcomes, arguments.plot)


if __name__ == "__main__":
    main()
