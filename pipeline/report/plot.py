"""Plot a model's artifacts, KL divergence against size on disk, as inline SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.report.results import ArtifactEntry

COLORS = {
    "published": "#16803c",
    "verified": "#16803c",
    "skipped": "#5b6573",
    "rejected": "#b3261e",
    "failed": "#b3261e",
}

# Height of the axis, and of a label with its gap, in points.
AXIS_POINTS, LABEL_POINTS = 190, 12


def kl_against_size(artifacts: Sequence[ArtifactEntry]) -> Markup | None:
    """SVG of all artifacts with metrics (KL in nats, logarithmic; size in MB), None if there is none."""
    points = [(a.bytes / 1e6, max(a.metrics.kl_mean, 1e-7), a) for a in artifacts if a.metrics and a.bytes]
    if not points:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for size, kl, artifact in points:
        axes.scatter(size, kl, s=46, color=COLORS[artifact.status], zorder=3)
    reference = max(a.reference_bytes for _, _, a in points) / 1e6
    if reference:
        axes.axvline(reference, color="#9aa3af", linestyle="--", linewidth=1)
        axes.annotate(
            "half precision", (reference, 0.98), xycoords=("data", "axes fraction"), xytext=(-5, 0),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=9, color="#5b6573",
        )  # fmt: skip
    axes.set_xlim(0, max([reference, *(size for size, _, _ in points)]) * 1.12)
    axes.set_yscale("log")
    low, high = min(kl for _, kl, _ in points) / 3, max(kl for _, kl, _ in points) * 3
    axes.set_ylim(low, high)
    middle = axes.get_xlim()[1] / 2
    for (size, kl, artifact), lift in zip(points, _lifts([kl for _, kl, _ in points], low, high), strict=True):
        side = "left" if size < middle else "right"
        axes.annotate(
            artifact.recipe, (size, kl), xytext=(9 if side == "left" else -9, lift), textcoords="offset points",
            ha=side, va="center", fontsize=9, color="#111827",
        )  # fmt: skip
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel("mean KL divergence, nats/token")
    axes.grid(True, which="major", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
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
