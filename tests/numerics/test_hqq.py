"""HQQ against an exhaustive search of small grids, and the properties of its steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.numerics import hqq, rounding


def weights(rows: int = 64, columns: int = 128, seed: int = 0) -> Tensor:
    """Heavy tails: what the norm below 1 is for."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return w * torch.where(torch.rand(rows, columns, generator=generator) < 0.03, 5.0, 1.0)


def error(w: Tensor, scale: Tensor, zero: Tensor, bits: int, norm: float) -> Tensor:
    codes = rounding.quantize(w, scale, zero, bits)
    noise = (rounding.dequantize(codes, scale, zero) - w).abs().pow(norm)
    return noise.unflatten(-1, (scale.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 64, None])
def test_no_group_is_worse_than_its_range(bits: int, group: int | None) -> None:
    w = weights(seed=bits)
    scale, zero = hqq.params(w, bits, group, scale_dtype=torch.float16, iterations=20, norm=0.7)
    plain, plain_zero = rounding.minmax_params(w, bits, group, symmetric=False, scale_dtype=torch.float16)
    assert plain_zero is not None
    assert (scale.dtype, zero.dtype, scale.shape) == (torch.float16, torch.int8, plain.shape)
    ours, theirs = error(w, scale, zero, bits, 0.7), error(w, plain, plain_zero, bits, 0.7)
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    if bits < 8:
        assert float(ours.sum()) < (0.97 if group else 0.96) * float(theirs.sum())


def test_it_comes_near_the_best_grid_there_is() -> None:
    """Every zero point with 120 scales, at 3 bits: what is left to gain is small beside what was gained."""
    w = weights(rows=24, columns=32)
    scale, zero = hqq.params(w, 3, None, scale_dtype=torch.float32, iterations=20, norm=0.7)
    low, high = rounding.code_range(3)
    span = (w.amax(-1) - w.amin(-1)).clamp(min=1e-6) / (high - low)
    best = torch.full((24, 1), torch.inf)
    for share in torch.linspace(0.1, 1.1, 120):
        for point in range(low, high + 1):
            found = error(w, (span * share)[:, None], torch.full((24, 1), point, dtype=torch.int8), 3, 0.7)
            best = torch.minimum(best, found)
    plain, plain_zero = rounding.minmax_params(w, 3, None, symmetric=False)
    assert plain_zero is not None
    before = float(error(w, plain, plain_zero, 3, 0.7).sum())
    after = float(error(w, scale, zero, 3, 0.7).sum())
    assert before - after > 0.4 * (before - float(best.sum()))


def test_groups_do_not_depend_on_their_neighbours() -> None:
    w = weights()
    scale, zero = hqq.params(w, 4, 32, scale_dtype=torch.float16, iterations=10, norm=0.7)
    half_scale, half_zero = hqq.params(w[17:40, 32:96], 4, 32, scale_dtype=torch.float16, iterations=10, norm=0.7)
    assert torch.equal(scale[17:40, 1:3], half_scale)
    assert torch.equal(zero[17:40, 1:3], half_zero)


def test_zeros_and_constants_stay_finite() -> None:
    w = torch.zeros(4, 32)
    w[1] = 3.0
    w[2] = -1e-7
    scale, zero = hqq.params(w, 4, None, scale_dtype=torch.float16, iterations=20, norm=0.7)
    restored = rounding.dequantize(rounding.quantize(w, scale, zero, 4), scale, zero)
    assert bool(restored.isfinite().all())
    assert not restored[0].any()
    torch.testing.assert_close(restored[1], w[1], rtol=1e-3, atol=0)
