"""Integer grids: compressed-tensors is the oracle, and the bounds that rounding must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.numerics import rounding

WIDTHS = [2, 3, 4, 5, 6, 7, 8]


def weights(seed: int, rows: int = 8, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(WIDTHS), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_scales_and_zero_points_are_the_librarys(bits: int, symmetric: bool, seed: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    w = weights(seed)
    scale, zero = rounding.minmax_params(w, bits, 16, symmetric=symmetric)
    groups = w.view(8, 4, 16)
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    want_scale, want_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    if symmetric:
        assert zero is None
    else:
        assert zero is not None
        assert torch.equal(zero.int(), want_zero.int())


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(WIDTHS), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_inside_the_range_the_error_is_at_most_half_a_step(bits: int, symmetric: bool, seed: int) -> None:
    w = weights(seed)
    scale, zero = rounding.minmax_params(w, bits, 16, symmetric=symmetric)
    codes = rounding.quantize(w, scale, zero, bits)
    low, high = rounding.code_range(bits)
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    error = (rounding.dequantize(codes, scale, zero) - w).abs().view(8, 4, 16)
    # The zero point is rounded too, and the symmetric grid has no code for the positive end of its range.
    assert bool((error <= 1.0001 * scale[..., None]).all())
    if symmetric:
        inside = (w.view(8, 4, 16) / scale[..., None]) <= high
        assert bool((error[inside] <= 0.5001 * scale[..., None].expand_as(error)[inside]).all())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_stands_for_itself(bits: int, symmetric: bool) -> None:
    low, high = rounding.code_range(bits)
    codes = torch.arange(low, high + 1, dtype=torch.int8)[None].repeat(2, 1)
    scale = torch.tensor([[0.37], [1e-4]])
    zero = None if symmetric else torch.tensor([[1], [-2]], dtype=torch.int8)
    assert torch.equal(rounding.quantize(rounding.dequantize(codes, scale, zero), scale, zero, bits), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    w = torch.zeros(2, 32)
    for params in (rounding.minmax_params, rounding.mse_params):
        scale, zero = params(w, 4, 16, symmetric=symmetric, scale_dtype=torch.bfloat16)
        assert bool((scale > 0).all())
        assert torch.equal(rounding.dequantize(rounding.quantize(w, scale, zero, 4), scale, zero), w)


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_the_mse_search_never_does_worse_than_min_max(bits: int, symmetric: bool, seed: int) -> None:
    w = weights(seed, rows=130)

    def errors(params: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        restored = rounding.dequantize(rounding.quantize(w, *params, bits), *params)
        return (restored - w).square().view(130, 4, 16).sum(-1)

    plain = errors(rounding.minmax_params(w, bits, 16, symmetric=symmetric))
    found = errors(rounding.mse_params(w, bits, 16, symmetric=symmetric))
    assert bool((found <= plain * 1.00001 + 1e-9).all())
    assert float(found.sum()) < float(plain.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_search_comes_near_the_best_of_all_shrinkages(bits: int, symmetric: bool) -> None:
    """On long rows with heavy tails (Student's t, 5 degrees), where the best range is a fraction of the whole."""
    normal = torch.randn(6, 32, 2048, generator=torch.Generator().manual_seed(5))
    w = normal[0] / normal[1:].square().mean(0).sqrt()

    def errors(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        codes = rounding.quantize(w, scale, zero, bits)
        return (rounding.dequantize(codes, scale, zero) - w).square().sum(-1)

    best = torch.full((32,), float("inf"))
    for percent in range(8, 101):
        ends = torch.stack([w.amin(1), w.amax(1)], 1) * percent / 100
        best = torch.minimum(best, errors(*rounding.minmax_params(ends, bits, None, symmetric=symmetric)))
    found = errors(*rounding.mse_params(w, bits, None, symmetric=symmetric))
    assert float(found.sum()) < 1.08 * float(best.sum())


def test_a_rows_scale_does_not_depend_on_the_other_rows() -> None:
    w = weights(6, rows=300, columns=256)
    w[::7, 3] = 200.0
    together = rounding.mse_params(w, 2, 128, symmetric=True)[0]
    alone = torch.cat([rounding.mse_params(row[None], 2, 128, symmetric=True)[0] for row in w[:20]])
    torch.testing.assert_close(together[:20], alone, rtol=0, atol=0)


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    w = weights(3)
    importance = torch.ones(64)
    importance[::4] = 100.0

    def weighted(params: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        restored = rounding.dequantize(rounding.quantize(w, *params, 3), *params)
        return float(((restored - w).square() * importance).sum())

    even = rounding.mse_params(w, 3, 16, symmetric=True)
    aimed = rounding.mse_params(w, 3, 16, symmetric=True, importance_I=importance)
    assert weighted(aimed) < weighted(even)


def test_scales_are_rounded_before_the_codes_are_chosen() -> None:
    w = weights(4)
    scale, _ = rounding.mse_params(w, 4, None, symmetric=True, scale_dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (8, 1)
