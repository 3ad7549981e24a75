"""AWQ's searches against what they search by hand: forwards, and ranges tried one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.numerics import awq, rounding


def problem(seed: int, rows: int = 48, columns: int = 64, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """Weights, and inputs of which some channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(columns)
    size[::9] = 20.0
    x = torch.randn(tokens, columns, generator=generator) * size
    return torch.randn(rows, columns, generator=generator), x


def output_error(w: Tensor, x: Tensor, scale_I: Tensor, bits: int, group: int | None, symmetric: bool) -> float:
    """What rounding changes in the outputs, by a forward of the tokens."""
    scaled = w * scale_I
    scale, zero = rounding.minmax_params(scaled, bits, group, symmetric=symmetric)
    rounded = rounding.dequantize(rounding.quantize(scaled, scale, zero, bits), scale, zero)
    return float(((x / scale_I) @ rounded.T - x @ w.T).double().square().sum())


def search(w: Tensor, x: Tensor, bits: int, group: int | None, symmetric: bool, grid: int) -> Tensor:
    return awq.input_scales(
        [(w[None], (x.T @ x)[None])],
        x.abs().mean(0),
        awq.weight_means([w[None]], group),
        bits=bits,
        group_size=group,
        symmetric=symmetric,
        grid=grid,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, None])
def test_it_finds_scales_that_lose_less_in_a_forward(symmetric: bool, group: int | None) -> None:
    w, x = problem(1)
    found = search(w, x, 3, group, symmetric, 20)
    plain = output_error(w, x, torch.ones(64), 3, group, symmetric)
    assert output_error(w, x, found, 3, group, symmetric) < 0.7 * plain
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())


def test_it_finds_about_the_best_of_a_whole_grid() -> None:
    w, x = problem(2)
    mean = x.abs().mean(0)
    losses = []
    for step in range(1, 21):
        scale = mean.pow(step / 20)
        losses.append(output_error(w, x, scale / (scale.amax() * scale.amin()).sqrt(), 3, 16, True))
    found = output_error(w, x, search(w, x, 3, 16, True, 20), 3, 16, True)
    assert found <= 1.02 * min(losses)


def test_nothing_is_scaled_where_nothing_is_gained() -> None:
    """Weights that are on the grid already lose nothing as they are."""
    w = torch.randint(-8, 8, (32, 64), generator=torch.Generator().manual_seed(3)).float()
    w[:, ::16], w[:, 1::16] = -8, 7
    _, x = problem(3)
    assert torch.equal(search(w, x, 4, 16, False, 20), torch.ones(64))


def test_inputs_that_never_came_keep_their_scale() -> None:
    w, x = problem(4)
    x[:, 5] = 0
    found = search(w, x, 3, 16, True, 10)
    assert float(found[5]) == 1.0
    assert torch.equal(search(w, torch.zeros_like(x), 3, 16, True, 10), torch.ones(64))


def test_several_weights_share_one_scale() -> None:
    (w, x), (v, _) = problem(5), problem(6, rows=16)
    h = (x.T @ x)[None]
    stacked = awq.input_scales(
        [(torch.cat([w, v])[None], h)], x.abs().mean(0), awq.weight_means([torch.cat([w, v])[None]], 16), bits=3,
        group_size=16, symmetric=True, grid=20,
    )  # fmt: skip
    apart = awq.input_scales(
        [(w[None], h), (v[None], h)], x.abs().mean(0), awq.weight_means([w[None], v[None]], 16), bits=3,
        group_size=16, symmetric=True, grid=20,
    )  # fmt: skip
    torch.testing.assert_close(stacked, apart)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64])
def test_clipping_takes_each_group_s_best_share(symmetric: bool, group: int) -> None:
    w, x = problem(7, rows=5)
    h = x.T @ x
    scale, zero = awq.clipped_params(w[None], h[None], 3, group, symmetric=symmetric)
    assert scale.shape == (1, 5, 64 // group)
    for row in range(5):
        for index in range(64 // group):
            part = slice(index * group, (index + 1) * group)
            block = h[part, part].double()

            def loss(s: Tensor, z: Tensor | None, weights: Tensor = w[row : row + 1, part]) -> float:
                codes = rounding.quantize(weights, s, z, 3)
                error = (rounding.dequantize(codes, s, z) - weights).double()
                return float(((error @ block) * error).sum())  # noqa: B023

            tried = [
                rounding.minmax_params(w[row : row + 1, part] * clip, 3, None, symmetric=symmetric)
                for clip in awq.CLIPS
            ]
            own = loss(scale[0, row, index].view(1, 1), None if zero is None else zero[0, row, index].view(1, 1))
            assert own <= min(loss(s, z) for s, z in tried) * (1 + 1e-4)


def test_weight_means_are_shares_of_the_group_s_largest() -> None:
    w = torch.tensor([[[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, 3.0, 3.0]]])
    assert awq.weight_means([w], 2).tolist() == [0.25, 0.5, 0.5, 1.0]
