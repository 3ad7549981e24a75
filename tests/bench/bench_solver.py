"""GPTQ of one weight against the one matrix product W @ H that bounds it, in one process.

python tests/bench/bench_solver.py [--threads N] [--size N]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from workers.numerics import gptq, rounding


def best_of(action: Callable[[], object], repetitions: int = 5) -> float:
    """Least seconds of some repetitions, after one that doesn't count."""
    action()
    seconds = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def textbook(
    w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, low: int, high: int, block: int = 128
) -> torch.Tensor:
    """Algorithm 1 of the paper as it stands, float32, lazy updates by blocks, one scale for each row and group."""
    w = w.clone()
    width = w.shape[1]
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(width)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.zeros_like(w)
    group = width // scale.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(w.shape[0], stop - start)
        for j in range(start, stop):
            column, s = w[:, j], scale[:, j // group]
            code = (column / s).round().clamp(low, high)
            codes[:, j] = code
            error = (column - code * s) / upper[j, j]
            w[:, j:stop] -= error[:, None] * upper[j, j:stop][None]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    n = arguments.size
    x = torch.randn(2 * n, n) @ (torch.randn(n, n) / n**0.5)
    h, w = x.T @ x, torch.randn(n, n)
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, {n} x {n}")
    bound = best_of(lambda: w @ h)
    print(f"W @ H                             {bound:7.3f} s")

    def ours(search: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], order: bool) -> gptq.Solution:
        scale, zero = search(w, 4, 128, symmetric=True, scale_dtype=torch.bfloat16)
        return gptq.solve(w[None], h[None], scale[None], zero, bits=4, activation_order=order, damping=0.01)

    for name, search, order in (
        ("min-max scales", rounding.minmax_params, False),
        ("min-max scales, activation order", rounding.minmax_params, True),
        ("MSE scales, activation order", rounding.mse_params, True),
    ):
        seconds = best_of(lambda search=search, order=order: ours(search, order))  # type: ignore[misc]
        print(f"{name:<33} {seconds:7.3f} s  {seconds / bound:5.2f} x")
    scale, _ = rounding.minmax_params(w, 4, 128, symmetric=True)
    seconds = best_of(lambda: textbook(w, h, scale, -8, 7), 2)
    print(f"{'textbook loop, min-max scales':<33} {seconds:7.3f} s  {seconds / bound:5.2f} x")


if __name__ == "__main__":
    main()
