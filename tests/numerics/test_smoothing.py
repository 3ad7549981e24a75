"""SmoothQuant's scales by the paper's formula, and where it has none."""

import pytest
import torch

from workers.numerics import smoothing


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
def test_the_paper_s_formula(strength: float) -> None:
    x, w = torch.tensor([1.0, 4.0, 100.0]), torch.tensor([2.0, 1.0, 0.25])
    want = [float(a) ** strength / float(b) ** (1 - strength) for a, b in zip(x, w, strict=True)]
    assert smoothing.scales(x, w, strength).tolist() == pytest.approx(want)


def test_half_way_both_ranges_become_the_same() -> None:
    x, w = torch.rand(64) * 50 + 0.1, torch.rand(64) + 0.01
    s = smoothing.scales(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)


def test_what_says_nothing_is_not_scaled_and_nothing_runs_away() -> None:
    s = smoothing.scales(torch.tensor([0.0, 1.0, 1e30, 1e-30]), torch.tensor([1.0, 0.0, 1e-30, 1e30]), 0.5)
    assert s.tolist() == pytest.approx([1.0, 1.0, smoothing.MOST, smoothing.LEAST])
