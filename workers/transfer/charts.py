"""Charts of model cards, as PNG on white: a Hub shows no SVG, and its pages are light or dark."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from workers.spec.job import Metrics, Thresholds, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
BLUE, GREY, GREEN, RED = "#2f7dd1", "#8a94a3", "#1f8f4e", "#d0453b"
# Layers up to which each has a mark on the line.
MARKED = 48


class Point(NamedTuple):
    """One file of a chart of several: its label, bytes, and mean KL divergence to the original in nats for a token."""

    label: str
    bytes: int
    kl_mean: float


def of_artifact(verdict: Verdict, thresholds: Thresholds, size: int, reference_size: int) -> bytes | None:
    """An artifact's size beside the original's in bytes, its KL divergence beside the gate, and its noise by layer.

    None if nothing was measured.
    """
    if verdict.metrics is None or not math.isfinite(verdict.metrics.kl_mean):
        return None
    noisy = any(value is not None for value in verdict.layer_noise)
    figure = _figure(9.0, 2.4)
    size_axes, kl_axes, *rest = figure.subplots(1, 2 + noisy, width_ratios=[1, 1.25, 1.6][: 2 + noisy])
    _sizes(size_axes, size, reference_size)
    _divergence(kl_axes, verdict.metrics, thresholds)
    for axes in rest:
        _noise(axes, verdict.layer_noise)
    return _png(figure)


def of_files(points: Sequence[Point]) -> bytes | None:
    """KL divergence against size, with a line through those that no smaller file beats; None for fewer than two."""
    known = sorted((one for one in points if math.isfinite(one.kl_mean) and one.kl_mean > 0), key=lambda one: one.bytes)
    if len(known) < 2:
        return None
    figure = _figure(7.0, 3.6)
    axes = figure.subplots()
    best = [one for at, one in enumerate(known) if all(one.kl_mean < smaller.kl_mean for smaller in known[:at])]
    scale, unit = _unit(max(one.bytes for one in known))
    axes.plot([one.bytes / scale for one in best], [one.kl_mean for one in best], color=GREEN, alpha=0.5)
    axes.scatter([one.bytes / scale for one in known], [one.kl_mean for one in known], color=BLUE, zorder=3)
    for one in known:
        axes.annotate(
            one.label, (one.bytes / scale, one.kl_mean), xytext=(6, 4), textcoords="offset points", fontsize=8
        )
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(f"size, {unit}")
    axes.set_ylabel("KL divergence, nats/token")
    return _png(figure)


def _sizes(axes: Axes, size: int, reference_size: int) -> None:
    scale, unit = _unit(max(size, reference_size))
    bars = axes.barh(["original", "this"], [reference_size / scale, size / scale], color=[GREY, BLUE], height=0.6)
    axes.bar_label(bars, [f" {count / scale:.3g}" for count in (reference_size, size)], fontsize=8)
    axes.margins(x=0.25)
    axes.set_xlabel(f"weights, {unit}")


def _divergence(axes: Axes, metrics: Metrics, thresholds: Thresholds) -> None:
    """Mean, its 95 % bound and the 99th percentile, beside the mean that the gate allows."""
    rows = {"mean": metrics.kl_mean, "95 % bound": metrics.kl_mean_upper, "99th percentile": metrics.kl_p99}
    shown = {name: max(value, 1e-9) for name, value in rows.items() if math.isfinite(value)}
    axes.plot([*shown.values()], [*shown], "o", color=BLUE, zorder=3)
    axes.axvline(thresholds.kl_mean, color=RED, linestyle="--", linewidth=1)
    axes.annotate(
        "gate of the mean", (thresholds.kl_mean, 1), xycoords=("data", "axes fraction"), xytext=(-3, -3),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=7, color=RED,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("KL divergence, nats/token")


def _noise(axes: Axes, decibels: Sequence[float | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    found = [(layer, value) for layer, value in enumerate(decibels) if value is not None]
    layers, values = zip(*found, strict=True)
    axes.plot(layers, values, color=BLUE, linewidth=1.2, marker="o" if len(decibels) <= MARKED else None, markersize=4)
    axes.set_ylim(min(values) - 1, max(values) + 1)
    axes.set_xlim(-0.6, len(decibels) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("signal to noise, dB")


def _unit(largest: int) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    """The figure's PNG, the same bytes each time: without the name of the library."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(True, which="major", color=GREY, alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
