"""How exactly matrices are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def coarse_products() -> Iterator[None]:
    """Multiply float32 matrices with factors rounded to bfloat16 and sums in float32, where the processor has units.

    For the calibration and for comparing scales: what comes out is a thousandth off, which is far less than another
    sample of text would move it, and comes three to ten times as fast (AMX). References and verification stay exact.
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
    """Run layers with ``coarse_products``, and where a CPU has units for it with bfloat16 attention and linear layers.

    What the layers add to the float32 residual stream is then what the checkpoint's own bfloat16 would add.
    """
    halves = torch.cpu._is_amx_tile_supported()
    with coarse_products(), torch.autocast("cpu", torch.bfloat16, enabled=halves):
        yield
