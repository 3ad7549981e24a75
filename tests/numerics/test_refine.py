"""Refinement against exact least squares in float64, and that it never loses what it was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.numerics import gptq, rounding
from workers.numerics.refine import refine, refine_biased


def problem(seed: int, batch: int = 1, rows: int = 20, columns: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4 * columns, columns, generator=generator)
    x = x @ torch.randn(batch, columns, columns, generator=generator)
    return torch.randn(batch, rows, columns, generator=generator), x.mT @ x


def losses(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, damping: float = 0.01) -> Tensor:
    """The loss of each row under the damped H, float64 [B, O]."""
    h = h.double() + damping * torch.stack([m.diagonal().mean() * torch.eye(len(m)) for m in h]).double()
    error = w.double() - rounding.dequantize(codes, scale, zero).double()
    return ((error @ h) * error).sum(-1)


def solved(w: Tensor, h: Tensor, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    scale, zero = rounding.mse_params(w, bits, group, symmetric=symmetric, scale_dtype=dtype)
    factor = gptq.factorize(h, activation_order=True, damping=0.01)
    return gptq.solve(w, factor, scale, zero, bits=bits), scale, zero


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32, None]),
    symmetric=st.booleans(),
    batch=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_row_loses(seed: int, bits: int, group: int | None, symmetric: bool, batch: int, dtype: torch.dtype) -> None:
    w, h = problem(seed, batch)
    codes, scale, zero = solved(w, h, bits, group, symmetric, dtype)
    new_codes, new_scale = refine(w, h, codes, scale, zero, bits=bits, rounds=2, damping=0.01)
    before, after = losses(w, h, codes, scale, zero), losses(w, h, new_codes, new_scale, zero)
    assert new_scale.dtype == dtype
    assert bool((new_scale > 0).all())
    low, high = rounding.code_range(bits)
    assert low <= int(new_codes.min()) <= int(new_codes.max()) <= high
    assert bool((after <= before * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [3, 4])
def test_it_gains_after_gptq(bits: int) -> None:
    w, h = problem(3)
    codes, scale, zero = solved(w, h, bits, 32, True)
    gains = []
    for rounds in (1, 3):
        new_codes, new_scale = refine(w, h, codes, scale, zero, bits=bits, rounds=rounds, damping=0.01)
        gains.append(float(losses(w, h, new_codes, new_scale, zero).sum() / losses(w, h, codes, scale, zero).sum()))
    assert gains[1] < gains[0] < 0.97


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_the_least_squares_of_each_row(symmetric: bool) -> None:
    """With codes that can't move (H of a single direction aside, one bit left), only the scales are fitted."""
    w, h = problem(5, rows=6)
    codes, scale, zero = solved(w, h, 4, 32, symmetric)
    _, found = refine(w, h, codes, scale, zero, bits=4, rounds=1, damping=0.01)
    damped = h[0].double() + 0.01 * h[0].diagonal().mean().double() * torch.eye(96, dtype=torch.float64)
    root = torch.linalg.cholesky(damped).T
    for row in range(6):
        steps = codes[0, row].double().view(3, 32)
        if zero is not None:
            steps = steps - zero[0, row].double()[:, None]
        basis = torch.zeros(96, 3, dtype=torch.float64)
        for group in range(3):
            basis[32 * group : 32 * group + 32, group] = steps[group]
        exact = torch.linalg.lstsq(root @ basis, (root @ w[0, row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found[0, row].double(), exact, rtol=2e-4, atol=0)


def test_codes_are_a_coordinatewise_minimum_in_the_end() -> None:
    w, h = problem(6, rows=4, columns=32)
    codes, scale, zero = solved(w, h, 3, 16, True)
    codes, scale = refine(w, h, codes, scale, zero, bits=3, rounds=40, damping=0.01)
    least = losses(w, h, codes, scale, zero)
    low, high = rounding.code_range(3)
    for column in range(32):
        for step in (-1, 1):
            moved = codes.clone()
            moved[..., column] = (moved[..., column] + step).clamp(low, high)
            assert bool((losses(w, h, moved, scale, zero) >= least * (1 - 1e-5)).all())


def test_stacked_problems_are_solved_as_if_alone() -> None:
    w, h = problem(7, batch=3)
    codes, scale, zero = solved(w, h, 4, 32, False)
    together = refine(w, h, codes, scale, zero, bits=4, rounds=2, damping=0.01)
    for index in range(3):
        one = slice(index, index + 1)
        alone = refine(w[one], h[one], codes[one], scale[one], zero[one], bits=4, rounds=2, damping=0.01)
        assert (alone[0] == together[0][one]).float().mean() > 0.99
        torch.testing.assert_close(alone[1], together[1][one], rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_never_came_and_rows_of_zeros_stay_finite(symmetric: bool) -> None:
    w, h = problem(8)
    w[0, 2] = 0
    h[:, :40] = 0
    h[:, :, :40] = 0
    for hessian in (h, torch.zeros_like(h)):
        codes, scale, zero = solved(w, hessian, 4, 32, symmetric, torch.float16)
        new_codes, new_scale = refine(w, hessian, codes, scale, zero, bits=4, rounds=3, damping=0.01)
        assert bool(new_scale.isfinite().all())
        restored = rounding.dequantize(new_codes, new_scale, zero)
        assert bool(restored.isfinite().all())
        assert not restored[0, 2].any()


def test_arguments_stay_as_they_were() -> None:
    w, h = problem(9)
    codes, scale, zero = solved(w, h, 4, 32, False)
    before = [tensor.clone() for tensor in (w, h, codes, scale, zero)]
    refine(w, h, codes, scale, zero, bits=4, rounds=2, damping=0.01)
    assert all(torch.equal(a, b) for a, b in zip((w, h, codes, scale, zero), before, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    group=st.sampled_from([16, 32, None]),
    batch=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_row_loses_by_its_biases(seed: int, bits: int, group: int | None, batch: int, dtype: torch.dtype) -> None:
    w, h = problem(seed, batch)
    scale, integer = rounding.mse_params(w, bits, group, symmetric=False, scale_dtype=dtype)
    assert integer is not None
    zero = rounding.stored_zero(scale, integer, bits)
    codes = gptq.solve(w, gptq.factorize(h, activation_order=True, damping=0.01), scale, zero, bits=bits)
    new_codes, new_scale, new_zero = refine_biased(w, h, codes, scale, zero, bits=bits, rounds=2, damping=0.01)
    before, after = losses(w, h, codes, scale, zero), losses(w, h, new_codes, new_scale, new_zero)
    assert new_scale.dtype == dtype
    assert bool((after <= before * (1 + 1e-4)).all())
    stored = rounding.stored_zero(new_scale, new_zero, bits)
    torch.testing.assert_close(stored, new_zero, rtol=0, atol=1e-3)


def test_free_biases_gain_over_integer_zero_points() -> None:
    w, h = problem(4)
    w = w + 0.7 * torch.randn(1, 20, 1, generator=torch.Generator().manual_seed(1))
    codes, scale, zero = solved(w, h, 3, 32, False)
    assert zero is not None
    fixed_codes, fixed_scale = refine(w, h, codes, scale, zero, bits=3, rounds=3, damping=0.01)
    free = refine_biased(w, h, codes, scale, zero.float(), bits=3, rounds=3, damping=0.01)
    assert float(losses(w, h, *free).sum() / losses(w, h, fixed_codes, fixed_scale, zero).sum()) < 0.97
