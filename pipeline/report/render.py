"""Render report.html, one file that needs nothing else: what went wrong and what to do, then all that was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.night import Night, recommended
from pipeline.report.plot import history, kl_against_size, noise_by_layer, time_line
from pipeline.report.results import ArtifactEntry

# What the recommended artifact of a model may lose, in nats: the smallest within it is marked.
MOST_LOST = 0.02
_ORDER = ("failed", "rejected", "published", "verified", "skipped")


@dataclass(frozen=True)
class ModelSection:
    """One model of the report, with its artifacts and plot."""

    anchor: str
    name: str
    id: str
    revision: str
    artifacts: tuple[ArtifactEntry, ...]
    plot: Markup | None
    noise: Markup | None
    recommended: str | None
    link: str | None

    @property
    def needs_a_look(self) -> bool:
        """Whether something of it failed or was rejected."""
        return any(one.status in _ORDER[:2] for one in self.artifacts)


def render(night: Night) -> str:
    """Render the report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        megabytes=_megabytes, gigabytes=_gigabytes, number=_number, figures=_figures, seconds=_seconds,
        percent=_percent, base=_base,
    )  # fmt: skip
    results = night.results
    counts = {status: sum(a.status == status for a in results.artifacts) for status in _ORDER}
    return environment.get_template("report.html.j2").render(
        night=night,
        results=results,
        sections=_sections(results.artifacts),
        counts={k: v for k, v in counts.items() if v},
        took=_took(results.started_at, results.finished_at),
        time_line=time_line(night.steps),
        history=history(night.history),
        most_lost=MOST_LOST,
    )


def _sections(artifacts: Sequence[ArtifactEntry]) -> list[ModelSection]:
    models: dict[str, list[ArtifactEntry]] = {}
    for artifact in artifacts:
        models.setdefault(artifact.model, []).append(artifact)
    found: list[ModelSection] = []
    for id_, group in models.items():
        best = recommended(group, MOST_LOST)
        name, revision, plot = Path(id_).name, group[0].revision, kl_against_size(group, MOST_LOST)
        noise = noise_by_layer(group)
        chosen = best.recipe if best else None
        anchor, link = f"m{len(found)}", _link(id_, revision)
        found.append(ModelSection(anchor, name, id_, revision, tuple(group), plot, noise, chosen, link))
    return found


def _link(model: str, revision: str) -> str | None:
    """The page of a model of the Hub at its commit; None for a folder."""
    return f"https://huggingface.co/{model}/tree/{revision}" if model.count("/") == 1 and model[0].isalnum() else None


def _took(started: str, finished: str) -> str:
    try:
        seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    except ValueError:
        return ""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def _base(path: str) -> str:
    return Path(path).name


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB" if count else "–"


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
