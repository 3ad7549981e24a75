"""Render report.html from its template: a table, and for each model a plot of KL against size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.plot import kl_against_size
from pipeline.report.results import ArtifactEntry, Results


@dataclass(frozen=True)
class ModelSection:
    """One model of the report, with its artifacts and plot."""

    name: str
    id: str
    revision: str
    artifacts: tuple[ArtifactEntry, ...]
    plot: Markup | None


def render(results: Results) -> str:
    """Render the report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        megabytes=_megabytes, gigabytes=_gigabytes, number=_number, figures=_figures, seconds=_seconds, percent=_percent
    )
    counts = {status: sum(a.status == status for a in results.artifacts) for status in _ORDER}
    return environment.get_template("report.html.j2").render(
        results=results, sections=_sections(results.artifacts), counts={k: v for k, v in counts.items() if v}
    )


_ORDER = ("published", "verified", "skipped", "rejected", "failed")


def _sections(artifacts: Sequence[ArtifactEntry]) -> list[ModelSection]:
    models: dict[str, list[ArtifactEntry]] = {}
    for artifact in artifacts:
        models.setdefault(artifact.model, []).append(artifact)
    return [
        ModelSection(Path(id_).name, id_, group[0].revision, tuple(group), kl_against_size(group))
        for id_, group in models.items()
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count else "–"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count else "–"


def _figures(value: float) -> str:
    """Three significant figures: KL goes over many orders of magnitude."""
    return f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.3g}"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
