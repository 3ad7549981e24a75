"""How exactly matrices are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Multiplications from which on a product's own time counts, and not what it takes to convert for it.
LARGE = 1 << 28


@contextmanager
def coarse_products() -> Iterator[None]:
    """Multiply float32 matrices with factors rounded to bfloat16 and sums in float32, where the processor has units.

    For the calibration and for comparing scales: what comes out is a thousandth off, which is far less than another
    sample of text would move it, and comes three to ten times as fast with AMX, twice with AVX512-BF16. References and
    verification stay exact.
    Elsewhere it changes nothing. The setting is the process's.
    """
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


@contextmanager
def coarse_forwards() -> Iterator[None]:
    """Run layers with bfloat16 attention and linear layers where a CPU has units for it (AMX, AVX512-BF16).

    What the layers add to the float32 residual stream is then what the checkpoint's own bfloat16 would add.
    """
    halves = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        yield


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """``target += left @ right``, in place, for matrices or stacks of them; large ones as ``coarse_products``.

    For sums over tokens, and the solvers' corrections: a thousandth of a fraction of a step moves no code that isn't a
    toss-up. What is small takes longer to be converted, of a new shape each time (the tokens of an expert), than to be
    multiplied.
    """
    add = target.addmm_ if target.dim() == 2 else target.baddbmm_
    if left.numel() * right.shape[-1] < LARGE:
        add(left, right)
        return
    with coarse_products():
        add(left, right)
