"""GPTQ on the E2M1 grid: what it must equal where H says nothing, and that it never loses to rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.numerics import gptq, microscaling, refine
from workers.numerics.grids import E2M1

GRID = torch.tensor(sorted({sign * value for value in microscaling.VALUES for sign in (1, -1)}))


def problem(seed: int, rows: int = 8, width: int = 64) -> tuple[Tensor, Tensor]:
    """Weights [1, O, I] and H [1, I, I] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w_BOI = torch.randn(1, rows, width, generator=generator)
    mixed = torch.randn(width, width, generator=generator) / 4 + torch.eye(width)
    x_NI = torch.randn(256, width, generator=generator) @ mixed
    return w_BOI, (x_NI.T @ x_NI)[None]


def scales_of(w_BOI: Tensor, kind: str, importance_I: Tensor | None = None) -> Tensor:
    """The scales that a weight's groups are multiplied with, [1, O, G]."""
    if kind == "mxfp4":
        return microscaling.effective_scales(microscaling.mxfp4(w_BOI[0], importance_I)[1], None)[None]
    _, scale_OG, divisor = microscaling.nvfp4(w_BOI[0], None, importance_I)
    return microscaling.effective_scales(scale_OG, divisor)[None]


def loss(w_BOI: Tensor, values_BOI: Tensor, scale_BOG: Tensor, h_BII: Tensor) -> float:
    groups = scale_BOG.shape[-1]
    q_BOI = (values_BOI.unflatten(-1, (groups, -1)) * scale_BOG[..., None]).flatten(-2)
    e_BOI = (w_BOI - q_BOI).double()
    return float(torch.einsum("boi,bij,boj->", e_BOI, gptq.damped(h_BII, 0.01).double(), e_BOI))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(["mxfp4", "nvfp4"]))
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(seed: int, kind: str) -> None:
    w_BOI, _ = problem(seed)
    scale_BOG = scales_of(w_BOI, kind)
    factor = gptq.factorize(torch.eye(64)[None], activation_order=True, damping=0.01)
    values_BOI = gptq.solve_values(w_BOI, factor, scale_BOG, E2M1)
    scaled_BOI = (w_BOI.unflatten(-1, (scale_BOG.shape[-1], -1)) / scale_BOG[..., None]).flatten(-2)
    assert torch.equal(microscaling.encode(values_BOI[0]) & 7, microscaling.encode(scaled_BOI[0]) & 7)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(["mxfp4", "nvfp4"]))
def test_it_has_less_loss_than_rounding_and_each_sweep_no_more(seed: int, kind: str) -> None:
    w_BOI, h_BII = problem(seed)
    scale_BOG = scales_of(w_BOI, kind, h_BII[0].diagonal())
    factor = gptq.factorize(h_BII, activation_order=True, damping=0.01)
    values_BOI = gptq.solve_values(w_BOI, factor, scale_BOG, E2M1)
    rounded_BOI = E2M1((w_BOI.unflatten(-1, (scale_BOG.shape[-1], -1)) / scale_BOG[..., None]).flatten(-2))
    assert torch.isin(values_BOI, GRID).all()
    losses = [loss(w_BOI, values_BOI, scale_BOG, h_BII)]
    assert losses[0] < loss(w_BOI, rounded_BOI, scale_BOG, h_BII)
    for rounds in (1, 2, 3):
        swept_BOI = refine.descend(w_BOI, h_BII, values_BOI, scale_BOG, E2M1, rounds=rounds, damping=0.01)
        assert torch.isin(swept_BOI, GRID).all()
        losses.append(loss(w_BOI, swept_BOI, scale_BOG, h_BII))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(["mxfp4", "nvfp4"]))
def test_scales_follow_what_matters(seed: int, kind: str) -> None:
    w_BOI, h_BII = problem(seed)
    importance_I = h_BII[0].diagonal()

    def weighed(scale_BOG: Tensor) -> float:
        parts = w_BOI.unflatten(-1, (scale_BOG.shape[-1], -1))
        error = (E2M1(parts / scale_BOG[..., None]) * scale_BOG[..., None] - parts).flatten(-2)
        return float((error.square() * importance_I).sum())

    assert weighed(scales_of(w_BOI, kind, importance_I)) <= weighed(scales_of(w_BOI, kind)) * (1 + 1e-6)
    assert torch.equal(scales_of(w_BOI, kind, torch.ones(64)), scales_of(w_BOI, kind))


@pytest.mark.parametrize("value", GRID.tolist())
def test_every_code_is_its_own_nearest(value: float) -> None:
    assert E2M1(torch.tensor([value])).item() == value
    one = torch.full((1, 1), microscaling.BIAS, dtype=torch.uint8)
    assert microscaling.dequantize(microscaling.encode(torch.full((1, 32), value)), one, None)[0, 0] == value
