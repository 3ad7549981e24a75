"""Sets the precision of matrix products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

# Number of multiplications above which a product takes longer than converting its factors to bfloat16.
LARGE = 1 << 28


class _Thread(threading.local):
    """Settings of a thread, those of its greenlets among them."""

    exact = False


_thread = _Thread()


def compute_exactly() -> None:
    """From now on ``coarse_products`` changes nothing in this thread, one of several that multiply at the same time.

    Precision is a setting of the whole process: what one thread sets would change what another computes, by chance.
    """
    _thread.exact = True


@contextmanager
def coarse_products() -> Iterator[None]:
    """Multiply float32 matrices with factors rounded to bfloat16 and sums in float32, where the processor has units.

    For calibration and for comparing scales: the error of about 1e-3 is far smaller than the effect of another sample
    of text, and the speed-up is three to ten times with AMX, twice with AVX512-BF16. References and verification stay
    exact. Without such units it changes nothing. The setting is process-wide (``compute_exactly``).
    """
    if _thread.exact:
        yield
        return
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


@contextmanager
def coarse_forwards() -> Iterator[None]:
    """Run layers with bfloat16 attention and linear layers where a CPU has units for it (AMX, AVX512-BF16).

    The layers then add to the float32 residual stream what the checkpoint's own bfloat16 would add.
    """
    halves = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        yield


@lru_cache(maxsize=8)
def sums_halves(device: torch.device) -> bool:
    """Whether ``add_product`` takes halves there: on a card, from a version of torch on; tried with small ones."""
    if device.type == "cpu":
        return False
    target, ones = torch.full((16, 32), 0.25, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        add_product(target[:, 16:], ones, ones)
    except RuntimeError:  # "self and mat2 must have the same dtype"
        return False
    return bool((target[:, 16:] == 16.25).all())


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """``target += left @ right``, in place, for matrices or stacks of them; large ones under ``coarse_products``.

    Matrices in half precision, which a card multiplies exactly, are summed in the target's float32 (``sums_halves``).
    For sums over tokens, and the solvers' corrections: an error of a thousandth of a fraction of a step changes only
    codes that are nearly tied. Small products, of a new shape each time (the tokens of an expert), take longer to
    convert than to multiply.
    """
    if left.dtype != target.dtype:
        torch.addmm(target, left, right, out_dtype=target.dtype, out=target)
        return
    add = target.addmm_ if target.dim() == 2 else target.baddbmm_
    if left.numel() * right.shape[-1] < LARGE:
        add(left, right)
        return
    with coarse_products():
        add(left, right)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, as ``add_product`` computes it."""
    if left.numel() * right.shape[-1] < LARGE:
        return left @ right
    with coarse_products():
        return left @ right
