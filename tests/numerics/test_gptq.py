"""The solver against the paper's algorithm in float64, and the properties that any solution has."""

from dataclasses import dataclass

import pytest
import torch

from workers.numerics import gptq, rounding


@dataclass(frozen=True)
class Found:
    """Codes, and what the factor says of its making."""

    codes_BOI: torch.Tensor
    damping_B: tuple[float, ...]
    dead: int

    @property
    def damping(self) -> float:
        return max(self.damping_B)


def solved(
    w: torch.Tensor,
    h: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    bits: int,
    activation_order: bool,
    damping: float,
) -> Found:
    factor = gptq.factorize(h, activation_order=activation_order, damping=damping)
    return Found(gptq.solve(w, factor, scale, zero, bits=bits), factor.damping_B, factor.dead)


def problem(seed: int, rows: int = 24, columns: int = 96, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x


def textbook(
    w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, order: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323, column by column, in float64, on fixed grids."""
    low, high = rounding.code_range(bits)
    w, h = w.double()[:, order], h.double()[order][:, order]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    size = w.shape[1] // scale.shape[1]
    codes = torch.zeros_like(w)
    for j in range(w.shape[1]):
        group = int(order[j]) // size
        s = scale[:, group].double()
        z = 0.0 if zero is None else zero[:, group].double()
        codes[:, j] = (w[:, j] / s + z).round().clamp(low, high)
        error = (w[:, j] - (codes[:, j] - z) * s) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.int8)


def loss(
    w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> float:
    error = w.double() - rounding.dequantize(codes, scale, zero).double()
    return float(((error @ h.double()) * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_codes_are_those_of_the_paper(bits: int, symmetric: bool, ordered: bool, group: int | None) -> None:
    w, h = problem(bits)
    scale, zero = rounding.minmax_params(w, bits, group, symmetric=symmetric)
    zeros = None if zero is None else zero[None]
    found = solved(w[None], h[None], scale[None], zeros, bits=bits, activation_order=ordered, damping=0.01)
    order = h.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(96)
    want = textbook(w, h, scale, zero, bits, order)
    # A tie that falls the other way in float32 changes the rest of its row.
    same_rows = (found.codes_BOI[0] == want).all(1).float().mean()
    assert same_rows >= (0.9 if bits < 8 else 0.7)
    assert loss(w, h, found.codes_BOI[0], scale, zero) == pytest.approx(loss(w, h, want, scale, zero), rel=0.02)
    assert found.dead == 0
    assert found.damping == 0.01


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_codes_are_those_of_the_paper_across_blocks(batch: int, ordered: bool) -> None:
    """Wider than any block of the solver and of its factorization, and no multiple of them."""
    columns = 2 * gptq.OUTER + 32 + 4 * gptq.INNER
    problems = [problem(seed, rows=12, columns=columns, tokens=2 * columns) for seed in range(batch)]
    w, h = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    scale, zero = rounding.minmax_params(w, 4, 32, symmetric=False)
    assert zero is not None
    found = solved(w, h, scale, zero, bits=4, activation_order=ordered, damping=0.01)
    for index in range(batch):
        one = w[index], h[index], scale[index], zero[index]
        order = one[1].diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(columns)
        want = textbook(*one, 4, order)
        codes = found.codes_BOI[index]
        assert (codes == want).float().mean() > 0.97
        assert loss(*one[:2], codes, *one[2:]) == pytest.approx(loss(*one[:2], want, *one[2:]), rel=0.01)


def test_arguments_stay_as_they_were() -> None:
    w, h = problem(14)
    h[5] = h[:, 5] = 0
    scale, zero = rounding.minmax_params(w, 4, 32, symmetric=False)
    assert zero is not None
    given = [w[None], h[None], scale[None], zero[None]]
    before = [tensor.clone() for tensor in given]
    solved(*given, bits=4, activation_order=False, damping=0.01)
    assert all(torch.equal(tensor, was) for tensor, was in zip(given, before, strict=True))


def test_half_precision_weights_are_solved_as_the_same_values_in_float32() -> None:
    w, h = problem(15)
    half = w.to(torch.bfloat16)
    scale, _ = rounding.minmax_params(half, 4, 32, symmetric=True, scale_dtype=torch.bfloat16)
    codes = [
        solved(x[None], h[None], scale[None], None, bits=4, activation_order=True, damping=0.01).codes_BOI
        for x in (half, half.float())
    ]
    assert torch.equal(*codes)


def test_rows_of_zeros_stay_zeros() -> None:
    w, h = problem(16)
    w[3] = 0
    for symmetric in (True, False):
        scale, zero = rounding.mse_params(w, 4, 32, symmetric=symmetric, scale_dtype=torch.float16)
        zeros = None if zero is None else zero[None]
        found = solved(w[None], h[None], scale[None], zeros, bits=4, activation_order=True, damping=0.01)
        assert not rounding.dequantize(found.codes_BOI[0], scale, zero)[3].any()


def test_with_an_identity_hessian_it_rounds_to_nearest() -> None:
    w, _ = problem(6)
    scale, zero = rounding.minmax_params(w, 4, 32, symmetric=False)
    assert zero is not None
    found = solved(w[None], torch.eye(96)[None], scale[None], zero[None], bits=4, activation_order=True, damping=0.01)
    assert torch.equal(found.codes_BOI[0], rounding.quantize(w, scale, zero, 4))


@pytest.mark.parametrize("seed", range(5))
def test_it_beats_rounding_to_nearest(seed: int) -> None:
    w, h = problem(seed)
    scale, _ = rounding.minmax_params(w, 3, 32, symmetric=True)
    found = solved(w[None], h[None], scale[None], None, bits=3, activation_order=True, damping=0.01)
    nearest = loss(w, h, rounding.quantize(w, scale, None, 3), scale, None)
    assert loss(w, h, found.codes_BOI[0], scale, None) < 0.7 * nearest


def test_stacked_rows_and_stacked_problems_change_nothing() -> None:
    first, second = problem(7, columns=160), problem(8, columns=160)
    w = torch.stack([first[0], second[0]])
    h = torch.stack([first[1], second[1]])
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    both = solved(w, h, scale, None, bits=4, activation_order=True, damping=0.01).codes_BOI
    for index in range(2):
        one = slice(index, index + 1)
        alone = solved(w[one], h[one], scale[one], None, bits=4, activation_order=True, damping=0.01).codes_BOI[0]
        assert (alone == both[index]).float().mean() > 0.999
        half = solved(w[one, :11], h[one], scale[one, :11], None, bits=4, activation_order=True, damping=0.01)
        assert (half.codes_BOI[0] == both[index, :11]).float().mean() > 0.999


def test_the_same_problem_gives_the_same_bytes() -> None:
    w, h = problem(9, columns=288)
    scale, _ = rounding.mse_params(w, 4, 32, symmetric=True)
    runs = [solved(w[None], h[None], scale[None], None, bits=4, activation_order=True, damping=0.01) for _ in range(3)]
    assert torch.equal(runs[0].codes_BOI, runs[1].codes_BOI)
    assert torch.equal(runs[0].codes_BOI, runs[2].codes_BOI)


def test_dead_columns_are_rounded_to_nearest_and_counted() -> None:
    w, h = problem(10)
    h[:, 40:44] = 0
    h[40:44] = 0
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    found = solved(w[None], h[None], scale[None], None, bits=4, activation_order=True, damping=0.01)
    assert found.dead == 4
    assert torch.equal(found.codes_BOI[0][:, 40:44], rounding.quantize(w, scale, None, 4)[:, 40:44])


def test_no_tokens_at_all_is_rounding_to_nearest() -> None:
    w, _ = problem(11)
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    found = solved(w[None], torch.zeros(1, 96, 96), scale[None], None, bits=4, activation_order=True, damping=0.01)
    assert found.dead == 96
    assert torch.equal(found.codes_BOI[0], rounding.quantize(w, scale, None, 4))


def test_a_failed_factorization_is_damped_more_and_says_so() -> None:
    w, h = problem(12)
    h -= 0.05 * h.diagonal().mean() * torch.eye(96)
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    found = solved(w[None], h[None], scale[None], None, bits=4, activation_order=True, damping=0.001)
    assert found.damping > 0.001
    assert loss(w, h, found.codes_BOI[0], scale, None) >= 0


def test_what_one_problem_needs_leaves_its_neighbours_alone() -> None:
    w, h = problem(17)
    sick = h - 0.05 * h.diagonal().mean() * torch.eye(96)
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)

    def solve(*hessians: torch.Tensor) -> Found:
        count = len(hessians)
        rows, scales = w.expand(count, -1, -1), scale.expand(count, -1, -1)
        return solved(rows, torch.stack(hessians), scales, None, bits=4, activation_order=True, damping=0.01)

    well, mixed = solve(h, h, h), solve(h, sick, h)
    assert well.damping_B == (0.01, 0.01, 0.01)
    assert mixed.damping_B == (0.01, 0.1, 0.01)
    assert mixed.damping == 0.1
    assert torch.equal(mixed.codes_BOI[::2], well.codes_BOI[::2])
    assert not torch.equal(mixed.codes_BOI[1], well.codes_BOI[1])


def test_float64_comes_before_more_damping() -> None:
    """A single direction, and damping below float32's spacing at 1: there the second pivot is exactly zero."""
    h = torch.ones(1, 384, 384)
    w, _ = problem(18, columns=384)
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    found = solved(w[None], h, scale[None], None, bits=4, activation_order=False, damping=1e-8)
    assert found.damping == 1e-8
    assert loss(w, h[0], found.codes_BOI[0], scale, None) < loss(
        w, h[0], rounding.quantize(w, scale, None, 4), scale, None
    )


def test_what_no_damping_mends_is_an_error_that_names_the_problem() -> None:
    w, h = problem(19)
    hopeless = h - 5 * h.diagonal().mean() * torch.eye(96)
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    with pytest.raises(gptq.NotPositiveDefinite, match=r"problem 1 .* damping 1 of"):
        solved(
            torch.stack([w, w]),
            torch.stack([h, hopeless]),
            torch.stack([scale, scale]),
            None,
            bits=4,
            activation_order=True,
            damping=0.01,
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_statistics_are_an_error(poison: float) -> None:
    w, h = problem(13)
    h[3, 3] = poison
    scale, _ = rounding.minmax_params(w, 4, 32, symmetric=True)
    with pytest.raises(gptq.NotPositiveDefinite, match="NaN or Inf"):
        solved(w[None], h[None], scale[None], None, bits=4, activation_order=True, damping=0.01)
