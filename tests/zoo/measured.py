"""Keep what runs measured of the zoo's small models, for ``quantmill recipes``: configs/measured.json.

quantmill quantize tests/zoo/models/llama-tiny tests/zoo/models/qwen3-moe-tiny --recipe ... --out runs
python -m tests.zoo.measured runs/*/results.json
"""

import sys
from pathlib import Path

from pipeline.planning.catalog import MeasuredRow, read, write
from pipeline.report.results import Results


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


def main(paths: list[str]) -> None:
    """Replace what the runs measured anew, and keep the rest."""
    found = {(row.model, row.recipe): row for row in read()}
    for path in paths:
        found |= {(row.model, row.recipe): row for row in rows(Results.model_validate_json(Path(path).read_text()))}
    write(found.values())


if __name__ == "__main__":
    main(sys.argv[1:])
