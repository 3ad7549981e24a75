"""SmoothQuant's scales of a layer's inputs (arXiv 2211.10438, section 4).

I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scales outside of this range would cost a half-precision norm or weight its digits.
LEAST, MOST = 1e-5, 1e5


def scales(input_max_I: Tensor, weight_max_I: Tensor, strength: float) -> Tensor:
    """s = max|X|^a / max|W|^(1 - a) for each input (equation 4): the input is divided by it, the weight multiplied.

    ``input_max_I`` and ``weight_max_I``: largest magnitudes, float [I], nonnegative and finite; ``strength`` is a, in
    [0, 1]. Returns float32 [I] in [1e-5, 1e5]; 1 where either magnitude is zero, since the range is then unknown.
    """
    x_I, w_I = input_max_I.double(), weight_max_I.double()
    raw_I = x_I.pow(strength) / w_I.pow(1 - strength)
    usable_I = (x_I > 0) & (w_I > 0)
    return torch.where(usable_I, raw_I.clamp(LEAST, MOST), 1.0).float()


def scaled(matrix_OI: Tensor, columns_I: Tensor | None, rows_O: Tensor | None) -> Tensor:
    """``matrix_OI * columns_I / rows_O`` in float32; the matrix itself if both are None."""
    if columns_I is not None:
        matrix_OI = matrix_OI.float() * columns_I
    if rows_O is not None:
        matrix_OI = matrix_OI.float() / rows_O[:, None]
    return matrix_OI
