"""Chooses the blocks of a weight in one of ggml's types: scales by llama.cpp's encoder, codes by GPTQ on them.

O output features, I input features, R bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.errors import NumericalError
from workers.machine import ggml_library
from workers.methods.layer import Factors, require_finite
from workers.model.statistics import InputStatistics
from workers.numerics import ggml, gptq, refine
from workers.spec.ggml import TYPES
from workers.spec.recipes import GgufOptions

# What a scale of zero is replaced by while codes are solved: its group is zero whatever its codes are.
TINY = 1e-12


def encoded(kind: str, key: str, matrix_OI: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """llama.cpp's blocks, uint8 (O, R), on the CPU; ``importance_I`` weighs the columns.

    Raises:
        NumericalError: the weight contains NaN or Inf.
    """
    weight_OI = require_finite(key, matrix_OI).detach().to("cpu", torch.float32).contiguous()
    rows, columns = weight_OI.shape
    raw_OR = torch.empty(rows, TYPES[kind].row_bytes(columns), dtype=torch.uint8)
    weights = None if importance_I is None else importance_I.detach().to("cpu", torch.float32).contiguous()
    pointer = None if weights is None else weights.data_ptr()
    ggml_library.encode(kind, weight_OI.data_ptr(), raw_OR.data_ptr(), rows, columns, pointer)
    return raw_OR


def importance(statistics: InputStatistics | None) -> Tensor | None:
    """The importance of each column: the mean square of its input; None if no token came to it."""
    if statistics is None or statistics.count == 0:
        return None
    mean_I = statistics.gram_II.diagonal() / statistics.count
    return mean_I if bool((mean_I > 0).any()) else None


def blocks(
    options: GgufOptions, kind: str, key: str, matrix_OI: Tensor, statistics: InputStatistics | None, factors: Factors
) -> tuple[Tensor, tuple[str, ...]]:
    """Blocks uint8 (O, R) of a weight under the statistics of its inputs, and deviations from the recipe.

    Raises:
        NumericalError: the weight contains NaN or Inf, or the statistics stay indefinite under any damping.
    """
    weights_I = importance(statistics)
    raw_OR = encoded(kind, key, matrix_OI, weights_I)
    module = key.removesuffix(".weight")
    if statistics is None or weights_I is None:
        return raw_OR, (f"rounded as llama.cpp does without importances, for no calibration token came to it: {module}",)
    if options.codes != "solved" or ggml.LAYOUTS[kind].table is not None:
        return raw_OR, ()
    raw_OR, damping = _solved(options, kind, key, matrix_OI, raw_OR, statistics, factors)
    if damping > options.damping:
        what = f"damping raised from {options.damping:g} to {damping:g}"
        return raw_OR, (f"{what} for {module}: H wasn't positive definite",)
    return raw_OR, ()


def _solved(
    options: GgufOptions,
    kind: str,
    key: str,
    matrix_OI: Tensor,
    raw_OR: Tensor,
    statistics: InputStatistics,
    factors: Factors,
) -> tuple[Tensor, float]:
    """The blocks with codes by GPTQ on their own scales, and the damping that H needed."""
    layout, grid = ggml.LAYOUTS[kind], ggml.grid(kind, raw_OR)
    h_1II = statistics.gram_II[None]
    try:
        factor = factors.of((statistics,), h_1II, activation_order=True, damping=options.damping)
    except gptq.NotPositiveDefinite as error:
        raise NumericalError(f"ggml: {key}: {error}; calibrate on other text") from error
    # The solver's codes are centred; its zero points are the minimum in steps of the scale, and needn't be whole.
    centre = layout.low + (1 << layout.bits - 1)
    device = matrix_OI.device
    scale_OG = grid.scale_OG.to(device)
    scale_OG = torch.where(scale_OG == 0, TINY, scale_OG)
    zero_OG = torch.full_like(scale_OG, -float(centre)) if grid.minimum_OG is None else (
        grid.minimum_OG.to(device) / scale_OG - centre
    )  # fmt: skip
    w_1OI, zero_1OG = matrix_OI.float()[None], zero_OG[None] if grid.minimum_OG is not None or centre else None
    codes_1OI = gptq.solve(w_1OI, factor, scale_OG[None], zero_1OG, bits=layout.bits)
    if options.refine:
        codes_1OI = refine.descend(
            w_1OI, h_1II, codes_1OI, scale_OG[None], zero_1OG, bits=layout.bits, rounds=options.refine,
            damping=options.damping,
        )  # fmt: skip
    chosen_OI = codes_1OI[0].to("cpu", torch.int16) + centre
    return ggml.with_codes(kind, raw_OR, chosen_OI), factor.damping_B[0]
