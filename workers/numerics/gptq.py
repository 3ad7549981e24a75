"""GPTQ (arXiv 2210.17323): rounds column by column, and propagates each error to the following columns.

B stacked problems of one shape, O output features, I input features, G groups, e = w - q.

With H = R R^T, R upper triangular, the loss tr(E H E^T) is ||E R||^2, and column j of E R depends only on the columns
up to j: (e_j R_jj + sum_{k<j} e_k R_kj). So the code of column j is the nearest to w_j + sum_{k<j} e_k R_kj / R_jj: the
same codes as the paper's algorithm 1, without an inverse of H, and the sums are matrix products over blocks of columns.
W is kept transposed, so that columns are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from workers.numerics.grids import Floats, Integers, Nearest
from workers.numerics.precision import add_product
from workers.numerics.rounding import code_range

OUTER, INNER = 256, 8
SMALLEST_RAISED, LARGEST_DAMPING = 1e-4, 1.0


class NotPositiveDefinite(ArithmeticError):
    """H has no Cholesky factor under any damping, or contains NaN or Inf."""


@dataclass(frozen=True)
class Factor:
    """The part of a solution that depends on H alone, shared by all weights with these inputs.

    ``mixing_BII[j, k]`` is R_kj / R_jj, float32, in the column order ``order_BI`` (int64; None: unchanged).
    ``damping_B`` is each H's damping as a share of its mean diagonal: larger than requested if the Cholesky
    factorization failed. ``dead`` counts columns that received no tokens; they are rounded to nearest.
    """

    mixing_BII: Tensor
    order_BI: Tensor | None
    damping_B: tuple[float, ...]
    dead: int


def factorize(h_BII: Tensor, *, activation_order: bool, damping: float) -> Factor:
    """Factorize H, float32: X^T X of the inputs, or any positive multiple; zeros if there were no tokens.

    ``activation_order`` processes the columns in order of descending diag(H); groups keep their columns (static
    groups), so no index is stored. If float32 can't factorize an H, float64 is tried, then ten times the damping, up to
    its mean diagonal; the other problems' damping doesn't change.

    Raises:
        NotPositiveDefinite: H contains NaN or Inf, or isn't positive definite under any damping.
    """
    order_BI = _falling(h_BII) if activation_order else None
    factor_BII, dead, used = _factor(_permuted(h_BII, order_BI), damping)
    mixing_BII = (factor_BII / factor_BII.diagonal(dim1=-2, dim2=-1)[..., None, :]).mT
    return Factor(mixing_BII, order_BI, used, dead)


def solve(w_BOI: Tensor, factor: Factor, scale_BOG: Tensor, zero_BOG: Tensor | None, *, bits: int) -> Tensor:
    """Codes, int8 [B, O, I], for weights on given grids (``rounding``: scale and zero point of each group)."""
    return _solved(w_BOI, factor, scale_BOG, zero_BOG, Integers(*code_range(bits))).to(torch.int8)


def solve_values(
    w_BOI: Tensor, factor: Factor, scale_BOG: Tensor, nearest: Nearest, zero_BOG: Tensor | None = None
) -> Tensor:
    """Values of a grid, float32 [B, O, I]; less the zero points and times the groups' scales: the quantized weights.

    ``nearest`` rounds a tensor in place to the grid.
    """
    return _solved(w_BOI, factor, scale_BOG, zero_BOG, nearest)


def on_a_kernel(nearest: Nearest, device: torch.device) -> bool:
    """Whether one kernel rounds whole blocks of columns: on a card with Triton, to a grid that arithmetic rounds to."""
    return device.type == "cuda" and isinstance(nearest, Integers | Floats) and find_spec("triton") is not None


def sweep(
    wt_BIO: Tensor,
    mixing_BII: Tensor,
    error_BIO: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor | None,
    group_BI: Tensor,
    nearest: Nearest,
    *,
    lower: bool,
) -> Tensor:
    """``sweep_columns`` for parameters of groups; ``group_BI`` is each column's group. Codes [B, I, O] as floats."""
    if on_a_kernel(nearest, wt_BIO.device):
        from workers.numerics.kernels import columns

        assert isinstance(nearest, Integers | Floats)
        return columns.sweep(wt_BIO, mixing_BII, error_BIO, scale_BOG, zero_BOG, group_BI, nearest, lower=lower)
    scales = each_column(scale_BOG, group_BI)
    zeros = None if zero_BOG is None else each_column(zero_BOG, group_BI)
    # A single problem comes without B: its small operations then take two thirds of the time.
    alone = (wt_BIO[0], mixing_BII[0], error_BIO[0]) if len(wt_BIO) == 1 else (wt_BIO, mixing_BII, error_BIO)
    return sweep_columns(*alone, scales, zeros, nearest, lower=lower).view_as(wt_BIO)


def _solved(w_BOI: Tensor, factor: Factor, scale_BOG: Tensor, zero_BOG: Tensor | None, nearest: Nearest) -> Tensor:
    """Codes, as floats [B, O, I]."""
    order_BI, width = factor.order_BI, w_BOI.shape[-1]
    wt_BIO = _rows(transposed(w_BOI.float()), order_BI)
    columns_BI = torch.arange(width).expand(len(w_BOI), -1) if order_BI is None else order_BI
    group_BI = columns_BI.to(w_BOI.device) // (width // scale_BOG.shape[-1])
    errors_BIO = torch.zeros_like(wt_BIO)
    codes_BIO = sweep(wt_BIO, factor.mixing_BII, errors_BIO, scale_BOG, zero_BOG, group_BI, nearest, lower=True)
    return transposed(_rows(codes_BIO, None if order_BI is None else order_BI.argsort(1)))


def _falling(h_BII: Tensor) -> Tensor:
    return h_BII.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def _permuted(h_BII: Tensor, order_BI: Tensor | None) -> Tensor:
    if order_BI is None:
        return h_BII.float()
    pairs = zip(h_BII.float(), order_BI, strict=True)
    return _stacked([h_II.index_select(0, order_I).index_select(1, order_I) for h_II, order_I in pairs])


def transposed(tensor_BXY: Tensor, tile: int = 64) -> Tensor:
    """[B, Y, X], contiguous; on a CPU copied in tiles that fit in the cache, in a third of the time of a plain copy."""
    if tensor_BXY.device.type != "cpu":
        return tensor_BXY.mT.contiguous()
    batch, height, width = tensor_BXY.shape
    result = tensor_BXY.new_empty(batch, width, height)
    for top in range(0, height, tile):
        result[:, :, top : top + tile] = tensor_BXY[:, top : top + tile].mT
    return result


def _rows(tensor_BIO: Tensor, index_BI: Tensor | None) -> Tensor:
    if index_BI is None:
        return tensor_BIO
    pairs = zip(tensor_BIO, index_BI, strict=True)
    return _stacked([tensor_IO.index_select(0, index_I) for tensor_IO, index_I in pairs])


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Like ``torch.stack``, but without a copy for a single tensor."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def each_column(params_BOG: Tensor, group_BI: Tensor) -> Sequence[Tensor]:
    """The parameters of each column, float32 [B, O], or [O] for a single problem, without a copy per column."""
    params_BGO = params_BOG.float().transpose(1, 2).contiguous()
    if len(params_BGO) == 1:
        rows = _columns(params_BGO[0])
        return [rows[group] for group in group_BI[0].tolist()]
    return _columns(_rows(params_BGO, group_BI))


def _columns(tensor_BIO: Tensor) -> tuple[Tensor, ...]:
    """A view [B, O] of each column, all created at once: slicing in the loop costs as much as its arithmetic."""
    return torch.unbind(tensor_BIO, -2)


def _factor(h_BII: Tensor, damping: float) -> tuple[Tensor, int, tuple[float, ...]]:
    """R of each H, the number of dead columns, and the damping that each H needed.

    R is computed as the lower factor of H with rows and columns reversed, reversed again.
    """
    lower_BII, whole_B = cholesky(damped(h_BII.flip(1, 2), damping))
    used = [damping] * len(h_BII)
    dead_1 = (h_BII.diagonal(dim1=1, dim2=2) == 0).sum()[None]
    *whole, dead = torch.cat([whole_B.to(dead_1.dtype), dead_1]).tolist()  # in one wait
    for index in (index for index, positive in enumerate(whole) if not positive):
        lower_BII[index], used[index] = _factor_again(h_BII[index : index + 1].double(), damping, index)
    return lower_BII.flip(1, 2), dead, tuple(used)


def _factor_again(h_1II: Tensor, damping: float, index: int) -> tuple[Tensor, float]:
    """Factorize a single H that float32 couldn't, alone, so that other problems' results don't depend on it."""
    if not bool(torch.isfinite(h_1II).all()):
        raise NotPositiveDefinite(f"H of problem {index} holds NaN or Inf")
    used = damping
    while True:
        lower_1II, whole_1 = cholesky(damped(h_1II.flip(1, 2), used))
        if bool(whole_1):
            return lower_1II[0], used
        if used >= LARGEST_DAMPING:
            raise NotPositiveDefinite(
                f"H of problem {index} is not positive definite, with damping {used:g} of its mean diagonal"
            )
        used = min(max(used * 10, SMALLEST_RAISED), LARGEST_DAMPING)


def damped(h_BII: Tensor, damping: float) -> Tensor:
    """A copy of H, in its dtype, with ``damping`` times its mean diagonal added to its diagonal; never singular."""
    damped_BII = h_BII.clone()
    diagonal_BI = damped_BII.diagonal(dim1=1, dim2=2)
    mean_B1 = h_BII.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
    # A dead column has no products with the others: any diagonal value leaves them unaffected.
    diagonal_BI.add_((diagonal_BI == 0) * mean_B1)
    diagonal_BI += damping * mean_B1
    return damped_BII


def cholesky(h_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors, and whether each H was positive definite (bool [B]); ``h_BII`` is overwritten.

    Blocked, so that nearly all of it is matrix products: on a CPU more than twice as fast as LAPACK.
    """
    width, block = h_BII.shape[-1], 256 if h_BII.device.type == "cpu" else 1024
    whole_B = torch.ones(len(h_BII), dtype=torch.bool, device=h_BII.device)
    for start in range(0, width, block):
        stop = min(start + block, width)
        corner, info = torch.linalg.cholesky_ex(h_BII[:, start:stop, start:stop])
        whole_B &= info == 0
        h_BII[:, start:stop, start:stop] = corner
        if stop < width:
            below = torch.linalg.solve_triangular(corner, h_BII[:, stop:, start:stop].mT, upper=False).mT
            h_BII[:, stop:, start:stop] = below
            for left in range(stop, width, 2 * block):
                right = min(left + 2 * block, width)
                rows, columns = below[:, left - stop :], below[:, left - stop : right - stop]
                h_BII[:, left:, left:right].baddbmm_(rows, columns.mT, alpha=-1)
    return h_BII.tril_(), whole_B & torch.isfinite(h_BII.diagonal(dim1=1, dim2=2)).all(1)


def sweep_columns(
    wt_BIO: Tensor,
    mixing_BII: Tensor,
    error_BIO: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    nearest: Nearest,
    *,
    lower: bool,
) -> Tensor:
    """Round column after column to the code ``nearest`` to ``w_j + sum_k mixing[j, k] e_k``; codes [B, I, O] as floats.

    ``error_BIO`` is e, the current codes' error; each column's is updated as soon as it is rounded. ``mixing_BII`` has
    a zero diagonal; ``lower``: nothing above the diagonal is read. A single problem may come without B.
    """
    width = wt_BIO.shape[-2]
    target_BIO = wt_BIO.clone()
    codes_BIO = torch.empty_like(wt_BIO)
    targets, errors, codes, weights = map(_columns, (target_BIO, error_BIO, codes_BIO, wt_BIO))

    def add(rows: tuple[int, int], inside: tuple[int, int]) -> None:
        """Add to the targets of ``rows`` the contributions of the columns ``inside`` other than ``rows`` itself."""
        first, last = rows
        if lower:
            parts: tuple[tuple[int, int], ...] = ((inside[0], first),)
        elif last == first + 1:
            parts = (inside,)  # the diagonal is zero: one small product takes half the time of two
        else:
            parts = ((inside[0], first), (last, inside[1]))
        for start, stop in parts:
            if start < stop:
                target = target_BIO[..., first:last, :]
                add_product(target, mixing_BII[..., first:last, start:stop], error_BIO[..., start:stop, :])

    for start in range(0, width, OUTER):
        block = (start, min(start + OUTER, width))
        add(block, (0, width))
        for first in range(*block, INNER):
            inner = (first, min(first + INNER, block[1]))
            add(inner, block)
            for j in range(*inner):
                add((j, j + 1), inner)
                code = torch.div(targets[j], scales[j], out=codes[j])
                if zeros is None:
                    nearest(code)
                    torch.addcmul(weights[j], code, scales[j], value=-1, out=errors[j])
                else:
                    nearest(code.add_(zeros[j]))
                    torch.addcmul(weights[j], code - zeros[j], scales[j], value=-1, out=errors[j])
    return codes_BIO
