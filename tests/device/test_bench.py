"""The bench for a real card runs on the stand-in, in small."""

import pytest

from tests.bench.gpu_stack import HEADER
from tests.device import card


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_prints_one_table() -> None:
    small = ["--sizes", "128x256", "3x64x128", "--repetitions", "1", "--layers", "1", "2", "--hidden", "128"]
    small += ["--inner", "256", "--samples", "4", "--length", "64", "--without", "tests"]
    said = card.run("tests.bench.bench_gpu", *small, seconds=500).strip().splitlines()
    assert said[0].startswith("Stand-in for a card, torch")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in said[2:]]
    assert rows[0] == HEADER
    by_name = {row[0]: row for row in rows[2:]}
    assert len(by_name) == len(rows) - 2
    for size in ("128x256", "3x64x128"):
        for part in ("factorize", "GPTQ, 4 bits, loop in PyTorch", "HQQ", "NVFP4"):
            assert float(by_name[f"{size}, {part}"][1]) > 0
    for recipes in (1, 8):
        what, seconds, bound, peak, planned = by_name[f"{recipes} recipe(s), 2 layer(s)"]
        assert float(seconds) > float(bound) > 0, what
        assert 0 < float(peak) <= float(planned), what
    assert any(name.startswith("verification of gptq-w4-g128, 2 layers") for name in by_name)
    assert float(by_name["of which decoding gptq-w4-g128 and comparing it with its source, cuda"][1]) > 0
    assert any(name.startswith("bitsandbytes") for name in by_name)
