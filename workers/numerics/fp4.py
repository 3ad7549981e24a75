"""E2M1 with small groups: MXFP4 (OCP Microscaling 1.0) and NVFP4.

O output features, I input features, G groups of input columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the codes 0 to 7 stand for; 8 to 15 are the same with the sign.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, global_scale: Tensor | None) -> Tensor:
    """The weights that codes stand for, float32 [O, I]; as ``codes.Float4Weight`` has them."""
    values = torch.tensor(VALUES + tuple(-value for value in VALUES), device=codes_OI.device)
    scale = torch.exp2(scale_OG.float() - 127) if global_scale is None else scale_OG.float() / global_scale
    groups = values[codes_OI.long()].unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.unsqueeze(-1)).flatten(-2)
