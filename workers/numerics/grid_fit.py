"""Fits scales and minima that lie on a grid of their own to given codes, group by group, under the Hessian.

B stacked problems, O output features, I input features, G groups of g columns, e = w - q, loss tr(E H E^T), H damped.
With D_g the codes of group g, q = s_g D_g - m_g: the loss is least at s_g + D_g H e^T / D_g H_gg D_g^T, and at
m_g - 1 H_g e^T / 1 H_gg 1^T. Each is moved to the grid's point nearest to that, if the loss falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.numerics.gptq import damped


@dataclass(frozen=True)
class Steps:
    """The grid of a value for each group: whole multiples of ``unit_BOG`` from ``low`` to ``high``, or any float16."""

    unit_BOG: Tensor | None
    low: int = 0
    high: int = 0

    @property
    def alone(self) -> Steps:
        """The same grid for rows [1, B * O * G] with one group each."""
        return self if self.unit_BOG is None else replace(self, unit_BOG=self.unit_BOG.reshape(1, -1, 1))

    def nearest(self, value_BO: Tensor, group: int) -> Tensor:
        """The grid's points nearest to values of one group; zero where the unit is."""
        if self.unit_BOG is None:
            return value_BO.to(torch.float16).float()
        unit_BO = self.unit_BOG[..., group]
        return torch.where(unit_BO == 0, 0.0, (value_BO / unit_BO).round().clamp(self.low, self.high) * unit_BO)


def fit(
    w_BOI: Tensor,
    h_BII: Tensor,
    codes_BOI: Tensor,
    scale_BOG: Tensor,
    minimum_BOG: Tensor | None,
    steps: Steps,
    minimum_steps: Steps | None,
    *,
    damping: float,
) -> tuple[Tensor, Tensor | None]:
    """Scales and minima (float32) on their grids with at most the given ones' loss, row by row, for given codes."""
    h_BII = damped(h_BII.float(), damping)
    scale_BOG = scale_BOG.clone()
    minimum_BOG = None if minimum_BOG is None else minimum_BOG.clone()
    groups = scale_BOG.shape[-1]
    codes_BIO = codes_BOI.mT.float()
    size = codes_BIO.shape[1] // groups
    error_BIO = w_BOI.mT.float() - codes_BIO * scale_BOG.mT.repeat_interleave(size, 1)
    if minimum_BOG is not None:
        error_BIO += minimum_BOG.mT.repeat_interleave(size, 1)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        inside_Bgg, steps_BgO = h_BII[:, part, part], codes_BIO[:, part]
        slope_BgO = h_BII[:, part] @ error_BIO
        product_BgO = inside_Bgg @ steps_BgO
        move_BO = _move(
            scale_BOG[..., group], (steps_BgO * slope_BgO).sum(1), (steps_BgO * product_BgO).sum(1), steps, group
        )
        scale_BOG[..., group] += move_BO
        error_BIO[:, part] -= move_BO[:, None] * steps_BgO
        if minimum_BOG is not None and minimum_steps is not None:
            slope_BgO -= move_BO[:, None] * product_BgO
            curve_BO = inside_Bgg.sum((1, 2))[:, None].expand_as(move_BO)
            move_BO = _move(minimum_BOG[..., group], -slope_BgO.sum(1), curve_BO, minimum_steps, group)
            minimum_BOG[..., group] += move_BO
            error_BIO[:, part] += move_BO[:, None]
    return scale_BOG, minimum_BOG


def _move(now_BO: Tensor, slope_BO: Tensor, curve_BO: Tensor, steps: Steps, group: int) -> Tensor:
    """How far to move a value; zero where the loss wouldn't fall. Moving by d changes it by d (d curve - 2 slope)."""
    best_BO = now_BO + slope_BO / curve_BO.clamp(min=1e-30)
    move_BO = steps.nearest(best_BO, group) - now_BO
    falls_BO = move_BO.isfinite() & (move_BO * (move_BO * curve_BO - 2 * slope_BO) < 0)
    return torch.where(falls_BO, move_BO, 0.0)
