"""Solvers and searches of one weight on a card: one Markdown table for RESULTS.md. On the CPU where there is none.

python -m tests.bench.bench_gpu [--sizes 4096x4096 ...] [--repetitions N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from tests.bench.bench_solver import processor
from workers.numerics import gptq, hqq, microscaling, refine, rounding
from workers.numerics.grids import Integers

SIZES = ("4096x4096", "4096x14336")
HEADER = ("size", "what", "seconds", "peak GB", "column loop")


def parts(w_OI: torch.Tensor, h_II: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured for a weight and its inputs' X^T X, by name."""
    scale, zero = rounding.mse_params(w_OI[None], 4, 128, symmetric=True, scale_dtype=torch.float16)
    factor = gptq.factorize(h_II[None], activation_order=True, damping=0.01)
    codes = gptq.solve(w_OI[None], factor, scale, zero, bits=4)
    yield "factorize", lambda: gptq.factorize(h_II[None], activation_order=True, damping=0.01)
    yield "MSE scales", lambda: rounding.mse_params(w_OI[None], 4, 128, symmetric=True, scale_dtype=torch.float16)
    yield "GPTQ, 4 bits", lambda: gptq.solve(w_OI[None], factor, scale, zero, bits=4)
    yield (
        "refinement, 3 rounds",
        lambda: refine.refine(w_OI[None], h_II[None], codes, scale, zero, bits=4, rounds=3, damping=0.01),
    )
    yield "HQQ", lambda: hqq.params(w_OI, 4, 64, scale_dtype=torch.float16, iterations=20, norm=0.7)
    yield "NVFP4", lambda: microscaling.nvfp4(w_OI)
    yield "MXFP4", lambda: microscaling.mxfp4(w_OI)


def measured(device: torch.device, size: str, repetitions: int) -> Iterator[tuple[str, ...]]:
    """The table's rows for one size, outputs x inputs; the best of the repetitions, after one more to warm up."""
    outputs, inputs = map(int, size.split("x"))
    x_TI = torch.randn(2 * inputs, inputs, device=device)
    w_OI, h_II = torch.randn(outputs, inputs, device=device) / inputs**0.5, x_TI.T @ x_TI
    loop = "Triton" if gptq.on_a_kernel(Integers(-8, 7), device) else "PyTorch"
    for name, action in parts(w_OI, h_II):
        taken = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repetitions + 1):
            begun = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device.type == "cuda" else ""
        used = loop if name.startswith(("GPTQ", "refinement")) else ""
        yield size, name, f"{min(taken[1:]):.3f}", peak, used


def table(device: torch.device, sizes: list[str], repetitions: int) -> str:
    """The Markdown table, with the card's name above it."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    rows = [HEADER, ("---",) * len(HEADER), *(row for size in sizes for row in measured(device, size, repetitions))]
    return "\n".join([f"{name}, torch {torch.__version__}", "", *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(table(device, given.sizes, given.repetitions))


if __name__ == "__main__":
    main()
