"""GPTQ (arXiv 2210.17323): rounding column by column, each error passed on to the columns still to come.

B stacked problems of one shape, O output features, I input features, G groups, e = w - q.

With H = R R^T, R upper triangular, the loss tr(E H E^T) is ||E R||^2, and column j of E R depends on the columns up to
j alone: (e_j R_jj + sum_{k<j} e_k R_kj). So the code of column j is the nearest to w_j + sum_{k<j} e_k R_kj / R_jj: the
same codes as the paper's algorithm 1, without an inverse of H, and the sums are matrix products over blocks of columns.
W is kept transposed, so that a column lies contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.numerics.rounding import code_range

OUTER, INNER = 128, 16
LARGEST_DAMPING = 1.0


class NotPositiveDefinite(ArithmeticError):
    """H has no Cholesky factor, however strongly damped: it holds NaN or Inf."""


@dataclass(frozen=True)
class Solution:
    """What was found; ``loss_BO`` is (w - q) H (w - q)^T of each row under the undamped order of columns.

    ``damping`` is the share of the mean diagonal that H was damped with: larger than asked for where the Cholesky
    factorization failed. ``dead`` counts columns that no token ever touched; they are rounded to nearest.
    """

    codes_BOI: Tensor
    loss_BO: Tensor
    damping: float
    dead: int


def solve(
    w_BOI: Tensor,
    h_BII: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor | None,
    *,
    bits: int,
    activation_order: bool,
    damping: float,
) -> Solution:
    """Codes (int8 [B, O, I]) for weights on given grids (``rounding``: scale and zero point of each group).

    ``h_BII`` float32: X^T X of the inputs, any positive multiple of it. ``activation_order`` takes the columns in order
    of falling diag(H); groups stay where they are (static groups), so no index is stored.

    Raises:
        NotPositiveDefinite: H holds NaN or Inf.
    """
    order_BI = _order(h_BII, activation_order)
    factor_BII, dead, used = _factor(_permuted(h_BII, order_BI), damping)
    groups = scale_BOG.shape[-1]
    group_BI = order_BI // (w_BOI.shape[-1] // groups)
    wt_BIO = _columns(w_BOI.float(), order_BI)
    scale_BIO = _columns(scale_BOG.float(), group_BI)
    zero_BIO = None if zero_BOG is None else _columns(zero_BOG.float(), group_BI)
    codes_BIO, loss_BO = _round_columns(wt_BIO, factor_BII, scale_BIO, zero_BIO, *code_range(bits))
    restored = torch.empty_like(codes_BIO).scatter_(1, order_BI[:, :, None].expand_as(codes_BIO), codes_BIO)
    return Solution(restored.transpose(1, 2).contiguous().to(torch.int8), loss_BO, used, dead)


def _order(h_BII: Tensor, activation_order: bool) -> Tensor:
    diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
    if activation_order:
        return diagonal_BI.argsort(dim=1, descending=True, stable=True)
    return torch.arange(h_BII.shape[-1], device=h_BII.device).expand_as(diagonal_BI)


def _permuted(h_BII: Tensor, order_BI: Tensor) -> Tensor:
    batch = torch.arange(len(h_BII), device=h_BII.device)[:, None, None]
    return h_BII[batch, order_BI[:, :, None], order_BI[:, None, :]].float()


def _columns(w_BOI: Tensor, index_BI: Tensor) -> Tensor:
    """Columns in the order of ``index_BI``, transposed: [B, I, O] contiguous."""
    wt = w_BOI.transpose(1, 2)
    return wt.gather(1, index_BI[:, :, None].expand(-1, -1, wt.shape[2])).contiguous()


def _factor(h_BII: Tensor, damping: float) -> tuple[Tensor, int, float]:
    """R, the number of dead columns, and the damping that was needed; ``h_BII`` is a copy, and is changed."""
    diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
    dead_BI = diagonal_BI == 0
    mean_B1 = diagonal_BI.mean(1, keepdim=True)
    # A dead column has no products with the others: any diagonal leaves it alone.
    diagonal_BI += torch.where(dead_BI, mean_B1.clamp(min=1e-30), 0)
    mean_B1 = mean_B1.clamp(min=1e-30)
    added = 0.0
    used = damping
    while True:
        diagonal_BI += (used - added) * mean_B1
        added = used
        # R is the lower factor of H with rows and columns in reverse, reversed again.
        lower, info = torch.linalg.cholesky_ex(h_BII.flip(1, 2))
        if not bool(info.any()) and bool(torch.isfinite(lower).all()):
            return lower.flip(1, 2), int(dead_BI.sum()), used
        if used >= LARGEST_DAMPING or not bool(torch.isfinite(h_BII).all()):
            raise NotPositiveDefinite(f"H is not positive definite, with damping {used:g} of its mean diagonal")
        used = min(used * 10, LARGEST_DAMPING)


def _round_columns(
    wt_BIO: Tensor, factor_BII: Tensor, scale_BIO: Tensor, zero_BIO: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Codes [B, I, O] as floats, and the loss of each row [B, O]."""
    width = wt_BIO.shape[1]
    diagonal_BI1 = factor_BII.diagonal(dim1=1, dim2=2)[:, :, None]
    # mixing[j, k] = R_kj / R_jj: row j says what of the earlier errors goes into column j.
    mixing_BII = factor_BII.transpose(1, 2) / diagonal_BI1
    target_BIO = wt_BIO.clone()
    error_BIO = torch.empty_like(wt_BIO)
    codes_BIO = torch.empty_like(wt_BIO)
    # One view for each column, made at once: slicing in the loop would cost as much as its arithmetic.
    targets, errors, codes, weights, scales = map(_each_column, (target_BIO, error_BIO, codes_BIO, wt_BIO, scale_BIO))
    zeros = None if zero_BIO is None else _each_column(zero_BIO)
    for start in range(0, width, OUTER):
        stop = min(start + OUTER, width)
        if start:
            target_BIO[:, start:stop].baddbmm_(mixing_BII[:, start:stop, :start], error_BIO[:, :start])
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            if first > start:
                target_BIO[:, first:last].baddbmm_(mixing_BII[:, first:last, start:first], error_BIO[:, start:first])
            for j in range(first, last):
                if j > first:
                    targets[j].baddbmm_(mixing_BII[:, j : j + 1, first:j], error_BIO[:, first:j])
                code = torch.div(targets[j], scales[j], out=codes[j])
                if zeros is None:
                    code.round_().clamp_(low, high)
                    torch.addcmul(weights[j], code, scales[j], value=-1, out=errors[j])
                else:
                    code.add_(zeros[j]).round_().clamp_(low, high)
                    torch.addcmul(weights[j], code - zeros[j], scales[j], value=-1, out=errors[j])
    # What column j of E R came out as: the target missed, times R_jj.
    missed_BIO = target_BIO.sub_(wt_BIO).add_(error_BIO).mul_(diagonal_BI1)
    return codes_BIO, missed_BIO.square_().sum(1)


def _each_column(tensor_BIO: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor_BIO, 1, dim=1)
