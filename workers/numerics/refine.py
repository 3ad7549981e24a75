"""Refines GPTQ's result: alternately optimizes scales and codes under the same Hessian.

B stacked problems, O output features, I input features, G groups, e = w - q, loss tr(E H E^T) with H damped as GPTQ's.
Scales: with D_g the codes of group g minus their zero points (zero elsewhere), q = sum_g s_g D_g, and the best scales
of a row solve its normal equations A s = b, A_gk = D_g H D_k^T, b_g = D_g H w^T.
Zero points, where they are stored as biases: with m_g the group's value at its mean code, q = sum_g s_g D_g + m_g 1_g,
the scales are solved with m fixed and then m with the scales fixed; about the mean the two hardly depend on each other.
Codes: coordinate descent; the loss is minimal in column j at w_j + sum_{k != j} e_k H_kj / H_jj, rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.numerics.gptq import damped, sweep, transposed
from workers.numerics.grids import Integers, Nearest
from workers.numerics.precision import add_product, product
from workers.numerics.rounding import code_range, stored_zero

# Elements per piece of rows whose normal equations are built together: bounds the temporaries.
PIECE_ELEMENTS = 1 << 22
# The same on a card, and elements of products that several groups have there at a time: 1 GiB in float32.
ON_A_CARD, MANY_ELEMENTS = 1 << 26, 1 << 28
# Added to the diagonal of the normal equations, as a share of its mean: two groups' codes may be linearly dependent.
RIDGE = 1e-9


def refine(
    w_BOI: Tensor,
    h_BII: Tensor,
    codes_BOI: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor | None,
    *,
    bits: int,
    rounds: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Codes (int8 [B, O, I]) and scales (in the given dtype) with at most the given ones' loss, row by row.

    ``h_BII`` float32: X^T X of the inputs, or any positive multiple; ``damping`` is added to its diagonal, as a share
    of its mean. Zero points don't change. Rows without an improvement don't change.
    """
    problem = _Problem.of(w_BOI, h_BII, damping, scale_BOG.shape[2])
    codes_BIO = transposed(codes_BOI)
    for _ in range(rounds):
        scale_BOG = _scales(problem.h_BII, problem.hw_BIO, codes_BIO, scale_BOG, zero_BOG)
        codes_BIO = _codes(problem, codes_BIO, scale_BOG, zero_BOG, bits)
    return transposed(codes_BIO), scale_BOG


def descend(
    w_BOI: Tensor,
    h_BII: Tensor,
    values_BOI: Tensor,
    scale_BOG: Tensor,
    nearest: Nearest,
    *,
    rounds: int,
    damping: float,
    zero_BOG: Tensor | None = None,
) -> Tensor:
    """Values of a grid, float32 [B, O, I], with at most the given ones' loss; scales and zero points stay.

    ``nearest`` rounds a tensor in place to the grid; ``rounds`` are sweeps of coordinate descent over the columns.
    """
    _, mixing_BII = _mixing(h_BII, damping)
    wt_BIO, values_BIO = transposed(w_BOI.float()), transposed(values_BOI)
    group_BI = _groups(wt_BIO, scale_BOG.shape[2])
    for _ in range(rounds):
        values_BIO = _swept(wt_BIO, mixing_BII, values_BIO, scale_BOG, zero_BOG, group_BI, nearest)
    return transposed(values_BIO)


def _mixing(h_BII: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H damped, and H_kj / H_jj with a zero diagonal."""
    damped_BII = damped(h_BII, damping)
    mixing_BII = damped_BII / damped_BII.diagonal(dim1=1, dim2=2)[..., None]
    mixing_BII.diagonal(dim1=1, dim2=2).zero_()
    return damped_BII, mixing_BII


def refine_biased(
    w_BOI: Tensor,
    h_BII: Tensor,
    codes_BOI: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor,
    *,
    bits: int,
    rounds: int,
    damping: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``refine``, for zero points that are stored as biases in the dtype of the scales: they are solved, too.

    The zero points, given and returned, are float32, those that stored biases stand for (``rounding.stored_zero``).
    """
    problem = _Problem.of(w_BOI, h_BII, damping, scale_BOG.shape[2])
    codes_BIO = transposed(codes_BOI)
    for _ in range(rounds):
        scale_BOG, zero_BOG = _affine(problem, codes_BIO, scale_BOG, zero_BOG, bits)
        codes_BIO = _codes(problem, codes_BIO, scale_BOG, zero_BOG, bits)
    return transposed(codes_BIO), scale_BOG, zero_BOG


class _Problem(NamedTuple):
    """What stays the same over all rounds: H damped, its rows over its diagonal without that, W transposed, H W, and
    each column's group."""

    h_BII: Tensor
    mixing_BII: Tensor
    wt_BIO: Tensor
    hw_BIO: Tensor
    group_BI: Tensor

    @classmethod
    def of(cls, w_BOI: Tensor, h_BII: Tensor, damping: float, groups: int) -> _Problem:
        damped_BII, mixing_BII = _mixing(h_BII, damping)
        wt_BIO = transposed(w_BOI.float())
        hw_BIO = torch.zeros_like(wt_BIO)
        add_product(hw_BIO, damped_BII, wt_BIO)
        return cls(damped_BII, mixing_BII, wt_BIO, hw_BIO, _groups(wt_BIO, groups))


def _groups(wt_BIO: Tensor, groups: int) -> Tensor:
    """The group of each column, int64 [B, I]."""
    batch, width, _ = wt_BIO.shape
    return (torch.arange(width, device=wt_BIO.device) // (width // groups)).expand(batch, -1)


def _affine(
    problem: _Problem, codes_BIO: Tensor, scale_BOG: Tensor, zero_BOG: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The best scales and real zero points of each row for its codes; the given ones where storing undoes the gain."""
    batch, width, rows = codes_BIO.shape
    h_BII, groups = problem.h_BII, scale_BOG.shape[2]
    summed_BIG = torch.unflatten(h_BII, 2, (groups, -1)).sum(3)  # H 1_g
    normal_BGG = torch.unflatten(summed_BIG, 1, (groups, -1)).sum(2)
    own_BGg = torch.unflatten(summed_BIG, 1, (groups, -1)).diagonal(dim1=1, dim2=3).mT  # H_gg 1
    ridge_BG = RIDGE * normal_BGG.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(batch, groups)
    factor_BGG = torch.linalg.cholesky((normal_BGG + torch.diag_embed(ridge_BG)).double())
    piece = max(PIECE_ELEMENTS // (batch * width), 1)
    scales, zeros = [], []
    for start in range(0, rows, piece):
        part = slice(start, start + piece)
        scale, zero, codes = scale_BOG[:, part], zero_BOG[:, part], codes_BIO[:, :, part]
        weights, right = problem.wt_BIO[:, :, part], problem.hw_BIO[:, :, part]
        codes_BGgO = torch.unflatten(codes, 1, (groups, -1)).float()
        mean_BOG = ((own_BGg[..., None] * codes_BGgO).sum(2) / own_BGg.sum(2)[..., None]).mT
        middle_BGO = ((mean_BOG - zero) * scale.float()).mT
        new_scale = _scales(h_BII, right - summed_BIG @ middle_BGO, codes, scale, mean_BOG)
        swing_BIO = _decoded(codes, new_scale, mean_BOG)
        rest_BGO = torch.unflatten(right, 1, (groups, -1)).sum(2) - summed_BIG.mT @ swing_BIO
        middle_BGO = torch.cholesky_solve(rest_BGO.double(), factor_BGG).float()
        new_zero = stored_zero(new_scale, mean_BOG - middle_BGO.mT / new_scale.float(), bits)
        before_BO = _loss(h_BII, weights - _decoded(codes, scale, zero))
        after_BO = _loss(h_BII, weights - _decoded(codes, new_scale, new_zero))
        better = (after_BO < before_BO)[..., None] & new_zero.isfinite().all(2, keepdim=True)
        scales.append(torch.where(better, new_scale, scale))
        zeros.append(torch.where(better, new_zero, zero.float()))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def _decoded(codes_BIO: Tensor, scale_BOG: Tensor, zero_BOG: Tensor) -> Tensor:
    """The decoded weights, float32 [B, I, O]."""
    steps_BGgO = _steps(codes_BIO, scale_BOG.shape[2], zero_BOG)
    return (steps_BGgO * scale_BOG.float().mT[:, :, None, :]).flatten(1, 2)


def _loss(h_BII: Tensor, error_BIO: Tensor) -> Tensor:
    """e H e^T of each row, [B, O]."""
    product_BIO = torch.zeros_like(error_BIO)
    add_product(product_BIO, h_BII, error_BIO)
    return (product_BIO * error_BIO).sum(1)


def _scales(h_BII: Tensor, hw_BIO: Tensor, codes_BIO: Tensor, scale_BOG: Tensor, zero_BOG: Tensor | None) -> Tensor:
    """The best scales of each row for its codes; the given ones if rounding to their dtype would increase the loss."""
    batch, width, rows = codes_BIO.shape
    on_card = h_BII.device.type != "cpu"
    piece = max((ON_A_CARD if on_card else PIECE_ELEMENTS) // (batch * width), 1)
    equations = _normal_equations_of_many if on_card else _normal_equations
    scales = []
    for start in range(0, rows, piece):
        part = slice(start, start + piece)
        zero = None if zero_BOG is None else zero_BOG[:, part]
        steps_BGgO = _steps(codes_BIO[:, :, part], scale_BOG.shape[2], zero)
        normal_BOGG, right_BOG = equations(h_BII, hw_BIO[:, :, part], steps_BGgO)
        scales.append(_solved(normal_BOGG.double(), right_BOG.double(), scale_BOG[:, part]))
    return torch.cat(scales, 1)


def _steps(codes_BIO: Tensor, groups: int, zero_BOG: Tensor | None) -> Tensor:
    """Codes minus zero points: float32 [B, G, g, O]."""
    steps_BGgO = torch.unflatten(codes_BIO, 1, (groups, -1)).float()
    return steps_BGgO if zero_BOG is None else steps_BGgO - zero_BOG.mT[:, :, None, :]


def _normal_equations(h_BII: Tensor, hw_BIO: Tensor, steps_BGgO: Tensor) -> tuple[Tensor, Tensor]:
    """A [B, O, G, G] and b [B, O, G] of each row."""
    batch, groups, size, rows = steps_BGgO.shape
    right_BOG = (steps_BGgO * torch.unflatten(hw_BIO, 1, (groups, size))).sum(2).mT
    normal_BGGO = steps_BGgO.new_empty(batch, groups, groups, rows)
    for group in range(groups):
        # A is symmetric: compute only the groups from this one on.
        start = group * size
        product_BIO = steps_BGgO.new_zeros(batch, groups * size - start, rows)
        add_product(product_BIO, h_BII[:, start:, start : start + size], steps_BGgO[:, group])
        products_BGO = (torch.unflatten(product_BIO, 1, (groups - group, size)) * steps_BGgO[:, group:]).sum(2)
        normal_BGGO[:, group, group:] = products_BGO
        normal_BGGO[:, group:, group] = products_BGO
    return normal_BGGO.permute(0, 3, 1, 2), right_BOG


def _normal_equations_of_many(h_BII: Tensor, hw_BIO: Tensor, steps_BGgO: Tensor) -> tuple[Tensor, Tensor]:
    """``_normal_equations`` in few launches: as many groups at a time as ``MANY_ELEMENTS`` of products allow."""
    batch, groups, size, rows = steps_BGgO.shape
    right_BOG = (steps_BGgO * torch.unflatten(hw_BIO, 1, (groups, size))).sum(2).mT
    normal_BGGO = steps_BGgO.new_empty(batch, groups, groups, rows)
    many = max(1, MANY_ELEMENTS // steps_BGgO.numel())
    for first in range(0, groups, many):
        last = min(first + many, groups)
        here = slice(first * size, last * size)
        h_BnIg = torch.unflatten(h_BII[:, here.start :, here], 2, (last - first, size)).transpose(1, 2)
        product_BnIO = product(h_BnIg, steps_BGgO[:, first:last])
        each_BnGgO = torch.unflatten(product_BnIO, 2, (groups - first, size)).mul_(steps_BGgO[:, None, first:])
        torch.sum(each_BnGgO, 3, out=normal_BGGO[:, first:last, first:])
    # A is symmetric, and is there above the diagonal.
    normal_BGGO = torch.where(_below(groups, h_BII.device)[..., None], normal_BGGO.transpose(1, 2), normal_BGGO)
    return normal_BGGO.permute(0, 3, 1, 2), right_BOG


def _below(groups: int, device: torch.device) -> Tensor:
    """Whether an element of a matrix [G, G] is below the diagonal, bool."""
    number = torch.arange(groups, device=device)
    return number[:, None] > number


def _solved(normal_BOGG: Tensor, right_BOG: Tensor, scale_BOG: Tensor) -> Tensor:
    """The scales that solve the normal equations (in float64), in the dtype of ``scale_BOG``."""
    now_BOG = scale_BOG.double()
    diagonal_BOG = normal_BOGG.diagonal(dim1=2, dim2=3)
    # A group that is zero in all its columns keeps its scale, which has no effect.
    empty_BOG = diagonal_BOG == 0
    ridged_BOGG = normal_BOGG.clone()
    ridged_BOGG.diagonal(dim1=2, dim2=3).add_(RIDGE * diagonal_BOG.mean(2, keepdim=True) + empty_BOG)
    factor_BOGG, info_BO = torch.linalg.cholesky_ex(ridged_BOGG)
    exact_BOG = torch.cholesky_solve(right_BOG[..., None], factor_BOGG)[..., 0]
    rounded_BOG = exact_BOG.to(scale_BOG.dtype)
    unusable_BOG = empty_BOG | (info_BO != 0)[..., None]
    usable_BOG = (rounded_BOG > 0) & (rounded_BOG < torch.inf) & ~unusable_BOG
    trial_BOG = torch.where(usable_BOG, rounded_BOG, scale_BOG)
    change_BOG = trial_BOG.double() - now_BOG
    # The loss decreases by 2 d (b - A s) - d A d.
    slope_BOG = 2 * right_BOG - (normal_BOGG @ (2 * now_BOG + change_BOG)[..., None])[..., 0]
    better_BO = (change_BOG * slope_BOG).sum(-1) > 0
    return torch.where(better_BO[..., None], trial_BOG, scale_BOG)


def _codes(problem: _Problem, codes_BIO: Tensor, scale_BOG: Tensor, zero_BOG: Tensor | None, bits: int) -> Tensor:
    """One sweep of coordinate descent over the columns: int8 [B, I, O]."""
    of, nearest = (problem.wt_BIO, problem.mixing_BII), Integers(*code_range(bits))
    return _swept(*of, codes_BIO, scale_BOG, zero_BOG, problem.group_BI, nearest).to(torch.int8)


def _swept(
    wt_BIO: Tensor,
    mixing_BII: Tensor,
    codes_BIO: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor | None,
    group_BI: Tensor,
    nearest: Nearest,
) -> Tensor:
    """One sweep over the columns, on any grid: float32 [B, I, O]."""
    steps_BGgO = _steps(codes_BIO, scale_BOG.shape[2], zero_BOG)
    error_BIO = wt_BIO - (steps_BGgO * scale_BOG.float().mT[:, :, None, :]).flatten(1, 2)
    return sweep(wt_BIO, mixing_BII, error_BIO, scale_BOG, zero_BOG, group_BI, nearest, lower=False)
