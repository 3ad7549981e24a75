"""Rounds blocks of columns in one launch each, as ``workers.numerics.gptq.sweep_columns`` does in several a column.

B stacked problems, O output features, I input features, G groups, e = w - q; W is kept as [B, I, O].

Column j of W becomes the code nearest to ``w_j + sum_k mixing[j, k] e_k``, and e_j its new error. What the columns
outside a block of 256 add, and those inside by their errors as they were, is one matrix product before the block's
launch. Inside, a program of one warp takes 32 rows of W through the block, 32 columns at a time: a thread has one row,
and in registers what the changes of the columns so far add to its 32 columns. What a column needs is read several
columns ahead (``STAGES``), for on a card a read takes longer than rounding a column.

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

# Columns of a launch, those of them that are in registers at a time, and rows of a program: one for each thread.
BLOCK, WIDTH, ROWS = 256, 32, 32
STAGES = 6
# 1.5 x 2^23: added to a float32 of less than 2^22 and taken away again, it leaves the nearest integer, ties to even.
TO_INTEGER = tl.constexpr(12582912.0)
EXPONENT = tl.constexpr(grids.EXPONENT)
# The exponent's bits of a power of two less than these are those of its inverse.
OF_INVERSE = tl.constexpr(254 << 23)


@triton.jit
def _round_block(
    sums, weight, mixing, error, change, code, scale, zero, group,
    outputs, columns, next_row, next_column, of_mixing, of_sums, of_weight, of_change, of_scale, of_group,
    low, high, first, last, share, shares,
    ZEROS: tl.constexpr, SUMS: tl.constexpr, FLOATS: tl.constexpr,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Round ``columns`` columns of HEIGHT rows; grid (outputs / HEIGHT, problems).

    sums (of products; without ``SUMS`` none), weight, error, change (of the error, written and read), code: [columns,
    outputs], contiguous; mixing: [columns, columns], ``next_row`` and ``next_column`` are its strides; scale, zero:
    float32 [G, outputs]; group: int32 [columns]. ``of_*``: elements of a problem. ``first``, ``last``, ``share``: see
    ``grids.Floats``; ``shares`` is 1 / share.
    """
    problem = tl.program_id(1).to(tl.int64)
    sums += problem * of_sums
    weight += problem * of_weight
    error += problem * of_weight
    code += problem * of_weight
    change += problem * of_change
    mixing += problem * of_mixing
    scale += problem * of_scale
    zero += problem * of_scale
    group += problem * of_group
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    there = row < outputs
    k = tl.arange(0, WIDTH)
    for start in range(0, columns, WIDTH):
        rows = mixing + (start + k) * next_row
        inside = start + k < columns
        added = tl.zeros((WIDTH, HEIGHT), dtype=tl.float32)
        for before in tl.range(0, start, 1, num_stages=STAGES):
            mixed = tl.load(rows + before * next_column, mask=inside, other=0.0)
            moved = tl.load(change + before * outputs + row, mask=there, other=0.0)
            added += mixed[:, None] * moved[None, :]
        for j in tl.range(0, min(WIDTH, columns - start), 1, num_stages=STAGES):
            at = (start + j) * outputs + row
            params = tl.load(group + start + j) * outputs + row
            size = tl.load(scale + params, mask=there, other=1.0)
            given = tl.load(weight + at, mask=there, other=0.0)
            old = tl.load(error + at, mask=there, other=0.0)
            mixed = tl.load(rows + (start + j) * next_column, mask=inside & (k > j), other=0.0)
            wanted = given + tl.sum(tl.where((k == j)[:, None], added, 0.0), axis=0)
            if SUMS:
                wanted += tl.load(sums + at, mask=there, other=0.0)
            step = tl.div_rn(wanted, size)
            if ZEROS:
                middle = tl.load(zero + params, mask=there, other=0.0)
                step += middle
            step = tl.minimum(tl.maximum(step, low), high)
            if FLOATS:
                power = tl.minimum(tl.maximum(tl.abs(step), first), last).to(tl.int32, bitcast=True) & EXPONENT
                inverse = (-power + OF_INVERSE).to(tl.float32, bitcast=True)
                step = (step * (inverse * shares) + TO_INTEGER) - TO_INTEGER
                step *= power.to(tl.float32, bitcast=True) * share
            else:
                step = (step + TO_INTEGER) - TO_INTEGER
            tl.store(code + at, step, mask=there)
            if ZEROS:
                step -= middle
            left = given - step * size
            moved = left - old
            tl.store(error + at, left, mask=there)
            tl.store(change + at, moved, mask=there)
            added += mixed[:, None] * moved[None, :]
        tl.debug_barrier()  # of the changes' writes and the reads of those ahead


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
    change_BIO = wt_BIO.new_empty(problems, min(BLOCK, width), outputs)
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
        _round_block[programs](
            sums, weight, mixed, error_BIO[:, here], change_BIO, codes_BIO[:, here], scale_BGO, zero_BGO,
            group_BI[:, here], outputs, here.stop - start, mixed.stride(1), mixed.stride(2), mixed.stride(0),
            sums.stride(0), wt_BIO.stride(0), change_BIO.stride(0), scale_BGO.stride(0), group_BI.stride(0),
            float(low), float(high), float(floats.first), float(floats.last), floats.share, 1 / floats.share,
            ZEROS=zero_BOG is not None, SUMS=inside.stop > 0, FLOATS=isinstance(grid, Floats),
            WIDTH=WIDTH, HEIGHT=ROWS, STAGES=STAGES, num_warps=1,
        )  # fmt: skip
    return codes_BIO
