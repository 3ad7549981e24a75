"""Figures of a report, as inline SVG whose text takes the page's colours."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from pipeline.report.night import BAD, MADE, NightRow, Step, frontier, recommended
from pipeline.report.results import ArtifactEntry

GOOD, BADLY, SOFT, LINE = "#1f8f4e", "#d0453b", "#7d8796", "#8a94a3"
COLORS = dict.fromkeys(MADE, GOOD) | dict.fromkeys(BAD, BADLY) | {"skipped": SOFT}
STAGES = {"fetch": "#8a94a3", "quantize": "#2f7dd1", "keep": "#8a94a3", "verify": "#c98a1b", "publish": "#1f8f4e"}
# Nodes that the time line shows, those that worked longest.
NODES = 40
# Height of the axis, and of a label with its gap, in points.
AXIS_POINTS, LABEL_POINTS = 190, 12


def kl_against_size(artifacts: Sequence[ArtifactEntry], most: float) -> Markup | None:
    """SVG of all artifacts with metrics (KL in nats, logarithmic; size in MB), None if there is none.

    A line joins those that no smaller one beats; a ring marks the one that is recommended (``night.recommended``).
    """
    points = [(a.bytes / 1e6, max(a.metrics.kl_mean, 1e-7), a) for a in artifacts if a.metrics and a.bytes]
    if not points:
        return None
    from matplotlib.ticker import NullLocator

    figure, axes = _figure(6.4, 3.4, constrained=False)
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.15, top=0.97)
    best = [(one.bytes / 1e6, max(one.metrics.kl_mean, 1e-7)) for one in frontier(artifacts) if one.metrics]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=GOOD, linewidth=1, alpha=0.5, zorder=2)
    chosen = recommended(artifacts, most)
    for size, kl, artifact in points:
        axes.scatter(size, kl, s=46, color=COLORS[artifact.status], zorder=3)
        if artifact is chosen:
            axes.scatter(size, kl, s=150, facecolors="none", edgecolors=GOOD, linewidths=1.6, zorder=3)
    reference = max(a.reference_bytes for _, _, a in points) / 1e6
    if reference:
        axes.axvline(reference, color=LINE, linestyle="--", linewidth=1)
        axes.annotate(
            "source", (reference, 0.98), xycoords=("data", "axes fraction"), xytext=(-5, 0),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, max([reference, *(size for size, _, _ in points)]) * 1.12)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = min(kl for _, kl, _ in points) / 3, max(kl for _, kl, _ in points) * 3
    axes.set_ylim(low, high)
    middle = axes.get_xlim()[1] / 2
    for (size, kl, artifact), lift in zip(points, _lifts([kl for _, kl, _ in points], low, high), strict=True):
        side = "left" if size < middle else "right"
        axes.annotate(
            artifact.recipe, (size, kl), xytext=(11 if side == "left" else -11, lift), textcoords="offset points",
            ha=side, va="center", fontsize=9,
        )  # fmt: skip
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel("mean KL divergence, nats/token")
    return _svg(figure)


def noise_by_layer(artifacts: Sequence[ArtifactEntry]) -> Markup | None:
    """SVG of each artifact's noise by layer (lowest SQNR of its weights, in dB); None if none was measured."""
    rows = [artifact for artifact in artifacts if any(value is not None for value in artifact.layer_noise)]
    if not rows:
        return None
    layers = max(len(artifact.layer_noise) for artifact in rows)
    table = [
        [math.nan if value is None else value for value in (*a.layer_noise, *[None] * (layers - len(a.layer_noise)))]
        for a in rows
    ]
    height = 0.75 + 0.24 * len(rows)
    figure, axes = _figure(6.4, height, constrained=False)
    figure.subplots_adjust(left=0.26, right=0.95, bottom=0.5 / height, top=1 - 0.12 / height)
    drawn = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="none")
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), [artifact.recipe for artifact in rows], fontsize=9)
    axes.set_xticks(range(0, layers, math.ceil(layers / 16)))
    axes.set_xlabel("layer")
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, fraction=0.05, format="%.0f")
    bar.set_label("dB")
    bar.outline.set_visible(False)
    return _svg(figure)


def time_line(steps: Sequence[Step]) -> Markup | None:
    """SVG of what every node did when, by stage; None without a step that took time."""
    took = [step for step in steps if step.ended > step.began and step.node]
    if not took:
        return None
    work: dict[str, float] = {}
    for step in took:
        work[step.node] = work.get(step.node, 0.0) + step.ended - step.began
    nodes = sorted(sorted(work, key=lambda node: -work[node])[:NODES])
    figure, axes = _figure(9.6, 1.2 + 0.26 * len(nodes))
    start = min(step.began for step in took)
    longest = max(step.ended for step in took) - start
    unit, name = (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    for stage, color in STAGES.items():
        for failed in (False, True):
            bars = [s for s in took if s.stage == stage and (s.error is not None) == failed and s.node in nodes]
            for row, node in enumerate(nodes):
                spans = [((s.began - start) / unit, (s.ended - s.began) / unit) for s in bars if s.node == node]
                if spans:
                    edge = {"edgecolor": BADLY, "linewidth": 1.2} if failed else {"linewidth": 0}
                    axes.broken_barh(spans, (row - 0.36, 0.72), facecolors=color, alpha=0.85, **edge)
    axes.set_yticks(range(len(nodes)), nodes)
    axes.invert_yaxis()
    axes.set_xlim(0, longest / unit)
    begun = datetime.fromtimestamp(start, UTC).strftime("%H:%M UTC")
    axes.set_xlabel(f"{name} since {begun}")
    import matplotlib.patches as patches

    used = [stage for stage in STAGES if any(step.stage == stage for step in took)]
    handles = [patches.Patch(color=STAGES[stage], label=stage) for stage in used]
    if any(step.error for step in took):
        handles.append(patches.Patch(facecolor="none", edgecolor=BADLY, label="failed"))
    axes.legend(
        handles=handles, ncols=len(handles), frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return _svg(figure)


def history(rows: Sequence[NightRow]) -> Markup | None:
    """SVG of a zoo's nights: artifacts by what became of them, hours of work, median KL; None for one night."""
    if len(rows) < 2:
        return None
    figure, all_axes = _figure(9.6, 3.6, rows=3)
    places = range(len(rows))
    made, skipped, bad = ([getattr(row, name) for row in rows] for name in ("made", "skipped", "bad"))
    below = [a + b for a, b in zip(made, skipped, strict=True)]
    all_axes[0].bar(places, made, color=GOOD, label="made")
    all_axes[0].bar(places, skipped, bottom=made, color=SOFT, alpha=0.5, label="there already")
    all_axes[0].bar(places, bad, bottom=below, color=BADLY, label="failed or rejected")
    all_axes[0].legend(ncols=3, frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    all_axes[0].set_ylabel("artifacts")
    all_axes[1].bar(places, [row.hours for row in rows], color=STAGES["quantize"])
    all_axes[1].set_ylabel("hours")
    known = [(place, row.kl_median) for place, row in zip(places, rows, strict=True) if row.kl_median]
    if known:
        all_axes[2].plot(*zip(*known, strict=True), color=STAGES["verify"], marker="o", markersize=3, linewidth=1)
    all_axes[2].set_ylabel("median KL")
    every = math.ceil(len(rows) / 10)
    for axes in all_axes:
        axes.set_xticks(list(places)[::every], [row.started_at[5:10] for row in rows][::every])
    return _svg(figure)


def _figure(width: float, height: float, rows: int = 1, *, constrained: bool = True) -> tuple[Any, Any]:
    """A figure without a background, and its axes, with lines that stand out on light and dark pages.

    A constrained layout measures every text, which takes longer than drawing: too long for a figure of each model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if constrained else None)
    figure.patch.set_alpha(0)
    found = figure.subplots(rows, 1, sharex=rows > 1)
    for axes in [found] if rows == 1 else found:
        axes.patch.set_alpha(0)
        axes.grid(True, which="major", color=LINE, alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(which="both", color=LINE)
    return figure, found


def _svg(figure: Any) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # Text stays text: small, selectable, and in the colours of the page.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _lifts(kls: Sequence[float], low: float, high: float) -> list[float]:
    """Offset of each label above its data point, in typographic points, so that labels don't overlap."""
    scale = AXIS_POINTS / math.log10(high / low)
    lifts = [0.0] * len(kls)
    floor = -math.inf
    for index in sorted(range(len(kls)), key=lambda index: kls[index]):
        height = math.log10(kls[index] / low) * scale
        lifts[index] = max(0.0, floor - height)
        floor = height + lifts[index] + LABEL_POINTS
    return lifts
