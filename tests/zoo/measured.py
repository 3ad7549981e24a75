"""Keep what runs measured of the zoo's small models, for ``quantmill recipes``: configs/measured.json.

quantmill quantize tests/zoo/models/llama-tiny tests/zoo/models/qwen3-moe-tiny --recipe ... --out runs
python -m tests.zoo.measured runs/*/results.json
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from pipeline.planning.catalog import MeasuredRow, catalog, read, write
from pipeline.report.results import Results

ROOT = Path(__file__).parents[2]
# Recipes whose dots have their name beside them.
NAMED = ("gptq-w3-g128", "gptq-w4-g128", "gptq-mixed-4-8", "gptq-w8-g128", "bnb-nf4", "bnb-int8", "fp8-dynamic")
NAMED += ("nvfp4", "mlx-w3-g64", "mlx-w4-g64", "mlx-w6-g64", "mlx-w8-g64")
MODEL = "llama-tiny"


def rows(results: Results) -> list[MeasuredRow]:
    return [
        MeasuredRow(
            recipe=entry.recipe,
            model=Path(entry.model).name,
            kl_mean=float(f"{entry.metrics.kl_mean:.3g}"),
            top1_agreement=round(entry.metrics.top1_agreement, 4),
            bytes=entry.bytes,
            reference_bytes=entry.reference_bytes,
            seconds=float(f"{entry.seconds.quantize:.2g}"),
        )
        for entry in results.artifacts
        if entry.metrics
    ]


def figure(path: Path) -> None:
    """KL of llama-tiny's recipes against the size of the artifacts, as docs/choosing.md shows it."""
    formats = {row.name: row.format for row in catalog()}
    measured = [row for row in read() if row.model == MODEL]
    with plt.rc_context({"svg.hashsalt": "quantmill", "svg.fonttype": "none", "font.size": 9}):
        drawing, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for fmt in sorted({formats[row.recipe] for row in measured}):
            dots = [row for row in measured if formats[row.recipe] == fmt]
            axes.scatter([row.bytes / 1e6 for row in dots], [row.kl_mean for row in dots], label=fmt, s=22)
        for row in measured:
            if row.recipe in NAMED:
                right = row.bytes < 0.6 * row.reference_bytes
                place = {
                    "xytext": (5 if right else -5, 2),
                    "textcoords": "offset points",
                    "ha": "left" if right else "right",
                }
                axes.annotate(row.recipe, (row.bytes / 1e6, row.kl_mean), **place)
        whole = measured[0].reference_bytes / 1e6
        axes.set(yscale="log", xlabel=f"MB of the artifact (the source has {whole:.1f})")
        axes.set(ylabel=f"KL of {MODEL}, nats for each token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")
        plt.close(drawing)


def main(paths: list[str]) -> None:
    """Replace what the runs measured anew, and keep the rest."""
    found = {(row.model, row.recipe): row for row in read()}
    for path in paths:
        found |= {(row.model, row.recipe): row for row in rows(Results.model_validate_json(Path(path).read_text()))}
    write(found.values())
    figure(ROOT / "docs/choosing.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
