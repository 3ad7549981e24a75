"""The bench for a real card runs on the stand-in, in small."""

import pytest

from tests.bench.bench_gpu import HEADER
from tests.device import card


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_prints_one_table() -> None:
    said = card.run("tests.bench.bench_gpu", "--sizes", "128x256", "--repetitions", "1").strip().splitlines()
    assert said[0].startswith("Stand-in for a card, torch")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in said[2:]]
    assert rows[0] == HEADER
    assert {row[1] for row in rows[2:]} >= {"factorize", "GPTQ, 4 bits", "refinement, 3 rounds", "HQQ", "NVFP4"}
    assert all(float(row[2]) > 0 and float(row[3]) >= 0 for row in rows[2:])
