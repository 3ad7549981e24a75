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
NAMED = ("gptq-w3-g128", "gptq-w4-g128", "rtn-w4-g128", "gptq-mixed-4-8", "gptq-w8-g128", "bnb-nf4", "bnb-int8")
NAMED += ("fp8-dynamic", "nvfp4", "mlx-w3-g64", "mlx-w6-g64", "mlx-w8-g64", "mxfp4-w4a4")


def rows(results: Results) -> list[MeasuredRow]:
    return [
        MeasuredRow(
            recipe=entry.recipe,
            model=Path(entry.model).name,
            kl_mean=float(f"{entry.metrics.kl_mean:.3g}"),
            top1_agreement=round(entry.metrics.top1_agreement, 4),
            bytes=entry.bytes,
            reference_bytes=entry.reference_bytes,
        )
        for entry in results.artifacts
        if entry.metrics
    ]


def figure(path: Path) -> None:
    """KL of llama-tiny's recipes against their bits, as docs/choosing.md shows it."""
    with plt.rc_context({"svg.hashsalt": "quantmill", "svg.fonttype": "none", "font.size": 9}):
        drawing, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for fmt in sorted({row.format for row in catalog() if "llama-tiny" in row.kl}):
            rows = [row for row in catalog() if row.format == fmt and "llama-tiny" in row.kl]
            axes.scatter([row.bits or 0 for row in rows], [row.kl["llama-tiny"] for row in rows], label=fmt, s=22)
        for row in catalog():
            if row.name in NAMED:
                axes.annotate(
                    row.name, (row.bits or 0, row.kl["llama-tiny"]), xytext=(5, 3), textcoords="offset points"
                )
        axes.set(
            yscale="log", xlabel="bits for each weight, scales included", ylabel="KL, nats for each token (llama-tiny)"
        )
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        drawing.savefig(path, metadata={"Date": None}, facecolor="white")
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
