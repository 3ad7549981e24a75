"""Rounds blocks of columns in one launch each, as ``workers.numerics.gptq.sweep_columns`` does in several a column.

B stacked problems, O output features, I input features, G groups, e = w - q; W is kept as [B, I, O].

Column j of W becomes the code nearest to ``w_j + sum_k mixing[j, k] e_k``, and e_j its new error. What the columns
outside a block of 128 add, and those inside by their errors as they were, is one matrix product before the block's
launch; inside, a program takes 32 rows of W through the block, column by column, with the changes of their 128 x 32
errors in registers. So a block takes one product and one launch of this kernel, whether 1 or 128 problems are stacked.

The sums have another order than the loop's, so a code may differ where its target lies within a rounding error of the
middle between two codes. Loaded where Triton is installed, only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.numerics import grids
from workers.numerics.grids import E2M1, Floats, Integers
from workers.numerics.precision import product

BLOCK, ROWS = 128, 32
# 1.5 x 2^23: added to a float32 of less than 2^22 and taken away again, it leaves the nearest integer, ties to even.
TO_INTEGER = tl.constexpr(12582912.0)
EXPONENT = tl.constexpr(grids.EXPONENT)


@triton.jit
def _round_block(
    sums, weight, mixing, error, code, scale, zero, group,
    outputs, columns, of_mixing, next_of_mixing, next_of_sums, next_of_weight, next_of_scale, next_of_group,
    low, high, first, last, share,
    ZEROS: tl.constexpr, SUMS: tl.constexpr, FLOATS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Round ``columns`` <= WIDTH columns of HEIGHT rows; grid (outputs / HEIGHT, problems).

    sums (of products; without ``SUMS`` none), weight, error, code: [columns, outputs], contiguous; mixing: [columns,
    columns], its rows ``of_mixing`` apart; scale, zero: float32 [G, outputs]; group: int32 [columns]. ``next_of_*``:
    elements to the next problem's.
    ``first``, ``last``, ``share``: see ``grids.Floats``.
    """
    problem = tl.program_id(1).to(tl.int64)
    sums += problem * next_of_sums
    weight += problem * next_of_weight
    error += problem * next_of_weight
    code += problem * next_of_weight
    mixing += problem * next_of_mixing
    scale += problem * next_of_scale
    zero += problem * next_of_scale
    group += problem * next_of_group
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    there = row < outputs
    k = tl.arange(0, WIDTH)
    changes = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for j in range(columns):
        mixed = tl.load(mixing + j * of_mixing + k, mask=k < j, other=0.0)
        at = j * outputs + row
        given = tl.load(weight + at, mask=there, other=0.0)
        wanted = given + tl.sum(changes * mixed[None, :], axis=1)
        if SUMS:
            wanted += tl.load(sums + at, mask=there, other=0.0)
        params = tl.load(group + j).to(tl.int64) * outputs + row
        size = tl.load(scale + params, mask=there, other=1.0)
        step = tl.div_rn(wanted, size)
        if ZEROS:
            middle = tl.load(zero + params, mask=there, other=0.0)
            step += middle
        step = tl.minimum(tl.maximum(step, low), high)
        if FLOATS:
            apart = tl.minimum(tl.maximum(tl.abs(step), first), last)
            apart = (apart.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True) * share
            step = ((tl.div_rn(step, apart) + TO_INTEGER) - TO_INTEGER) * apart
        else:
            step = (step + TO_INTEGER) - TO_INTEGER
        tl.store(code + at, step, mask=there)
        if ZEROS:
            step -= middle
        left = given - step * size
        change = left - tl.load(error + at, mask=there, other=0.0)
        tl.store(error + at, left, mask=there)
        changes = tl.where((k == j)[None, :], change[:, None], changes)


def sweep(
    wt_BIO: Tensor,
    mixing_BII: Tensor,
    error_BIO: Tensor,
    scale_BOG: Tensor,
    zero_BOG: Tensor | None,
    group_BI: Tensor,
    grid: Integers | Floats,
    *,
    lower: bool,
) -> Tensor:
    """Codes as floats [B, I, O], numbers of the ``grid``; see ``gptq.sweep_columns``, which gives the same.

    ``error_BIO`` is replaced by the new codes' error. ``group_BI`` is each column's group.
    """
    problems, width, outputs = wt_BIO.shape
    assert error_BIO.is_contiguous(), "its blocks are written in place"
    wt_BIO = wt_BIO.contiguous()
    scale_BGO = scale_BOG.float().mT.contiguous()
    zero_BGO = scale_BGO if zero_BOG is None else zero_BOG.float().mT.contiguous()
    group_BI = group_BI.to(torch.int32).contiguous()
    codes_BIO = torch.empty_like(wt_BIO)
    programs = (triton.cdiv(outputs, ROWS), problems)
    floats = grid if isinstance(grid, Floats) else E2M1  # of integers unused
    low, high = (grid.low, grid.high) if isinstance(grid, Integers) else (-grid.largest, grid.largest)
    for start in range(0, width, BLOCK):
        here = slice(start, min(start + BLOCK, width))
        weight, mixing = wt_BIO[:, here], mixing_BII[:, here]
        # Above the diagonal of a factor there is nothing; other mixings' errors are all there.
        inside = slice(0, start if lower else width)
        sums = product(mixing[:, :, inside], error_BIO[:, inside]) if inside.stop else weight
        mixed = mixing[:, :, here]
        if mixed.stride(2) != 1:  # a factor's columns lie together: a program reads rows
            mixed = mixed.contiguous()
        _round_block[programs](
            sums, weight, mixed, error_BIO[:, here], codes_BIO[:, here], scale_BGO, zero_BGO, group_BI[:, here],
            outputs, here.stop - start, mixed.stride(1), mixed.stride(0), sums.stride(0), wt_BIO.stride(0),
            scale_BGO.stride(0), group_BI.stride(0), float(low), float(high), float(floats.first), float(floats.last),
            floats.share,
            ZEROS=zero_BOG is not None, SUMS=inside.stop > 0, FLOATS=isinstance(grid, Floats), WIDTH=BLOCK, HEIGHT=ROWS,
            num_warps=4,
        )  # fmt: skip
    return codes_BIO
