"""GPTQ of one weight against the one matrix product W @ H that bounds it, in one process.

python -m tests.bench.bench_solver [--threads N ...] [--size N] [--repetitions N]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from workers.numerics import gptq, refine, rounding


def best_of(actions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Least seconds of each, taken in turn so that what else the machine does falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repetitions + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begun)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def processor() -> str:
    """Its name, where the system tells it."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", listing.read_text()) if listing.exists() else []
    return names[0] if names else platform.machine()


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


def measure(size: int, repetitions: int) -> None:
    """Print the seconds of each, and their ratio to W @ H, with as many threads as torch is set to."""
    torch.manual_seed(0)
    x = torch.randn(2 * size, size) @ (torch.randn(size, size) / size**0.5)
    h, w = x.T @ x, torch.randn(size, size)
    params = {"min-max": rounding.minmax_params, "MSE": rounding.mse_params}

    def ours(scales: str, order: bool, rounds: int = 0) -> torch.Tensor:
        scale, _ = params[scales](w, 4, 128, symmetric=True, scale_dtype=torch.bfloat16)
        factor = gptq.factorize(h[None], activation_order=order, damping=0.01)
        codes = gptq.solve(w[None], factor, scale[None], None, bits=4)
        if rounds:
            codes, _ = refine.refine(w[None], h[None], codes, scale[None], None, bits=4, rounds=rounds, damping=0.01)
        return codes

    cases: dict[str, Callable[[], object]] = {"W @ H": lambda: w @ h}
    for scales in params:
        for order, suffix in ((False, ""), (True, ", activation order")):
            cases[f"{scales} scales{suffix}"] = partial(ours, scales, order)
    cases["MSE scales, activation order, refined"] = partial(ours, "MSE", True, 3)
    scale, _ = rounding.minmax_params(w, 4, 128, symmetric=True)
    seconds = best_of(cases, repetitions)
    seconds |= best_of({"textbook loop, min-max scales": lambda: textbook(w, h, scale, -8, 7)}, 1)
    for name, taken in seconds.items():
        print(f"  {name:<38} {taken:7.3f} s  {taken / seconds['W @ H']:6.2f} x")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{processor()}, {os.cpu_count()} cores{busy}, torch {torch.__version__}, {arguments.size} x {arguments.size}"
    )
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' if threads > 1 else ''}")
        measure(arguments.size, arguments.repetitions)


if __name__ == "__main__":
    main()
