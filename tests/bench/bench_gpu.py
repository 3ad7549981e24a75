"""What quantmill takes on a card, as one Markdown table for RESULTS.md; on the CPU where there is none.

python -m tests.bench.bench_gpu [--sizes 4096x4096 128x768x2048 ...] [--layers 1 3] [--hidden 4096 --inner 14336]
                                [--samples 128 --length 2048] [--without tests ...]

Solvers and searches of weights ([problems x] outputs x inputs), the column loop as a kernel and in PyTorch; bytes of
bitsandbytes; passes over a stack of layers with random weights, and a verification; the tests that need a card. Beside
the seconds is their bound by arithmetic (``tests.bench.roofline``), and beside peaks of memory what the plan counts on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from tests.bench import gpu_stack, roofline
from tests.bench.gpu_stack import HEADER, Row
from workers.numerics import gptq, hqq, microscaling, refine, rounding
from workers.numerics.grids import Integers

SIZES = ("4096x4096", "4096x14336", "128x768x2048")
PARTS = ("solvers", "bitsandbytes", "stack", "tests")


def parts(w_BOI: torch.Tensor, h_BII: torch.Tensor) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """What is measured for weights and their inputs' X^T X: its name, and its bound in seconds for one problem."""
    _, outputs, inputs = w_BOI.shape
    half = torch.float16
    scale, zero = rounding.mse_params(w_BOI, 4, 128, symmetric=True, scale_dtype=half)
    factor = gptq.factorize(h_BII, activation_order=True, damping=0.01)
    codes = gptq.solve(w_BOI, factor, scale, zero, bits=4)
    rounds = roofline.ROUNDS
    yield (
        "factorize",
        roofline.factorize(inputs),
        lambda: gptq.factorize(h_BII, activation_order=True, damping=0.01),
    )
    yield (
        "GPTQ, 4 bits",
        roofline.gptq(outputs, inputs),
        lambda: gptq.solve(w_BOI, factor, scale, zero, bits=4),
    )
    yield (
        f"refinement, {rounds} rounds",
        roofline.refinement(outputs, inputs),
        lambda: refine.refine(w_BOI, h_BII, codes, scale, zero, bits=4, rounds=rounds, damping=0.01),
    )
    search = roofline.search(outputs, inputs)
    w_OI = w_BOI.flatten(0, 1)
    yield "MSE scales", search, lambda: rounding.mse_params(w_BOI, 4, 128, symmetric=True, scale_dtype=half)
    yield "HQQ", search, lambda: hqq.params(w_OI, 4, 64, scale_dtype=half, iterations=20, norm=0.7)
    yield "NVFP4", search, lambda: microscaling.nvfp4(w_OI)
    yield "MXFP4", search, lambda: microscaling.mxfp4(w_OI)


def solvers(device: torch.device, size: str, repetitions: int) -> Iterator[Row]:
    """Rows of one size: the best of the repetitions, after one more to warm up; the loop in PyTorch once."""
    *batch, outputs, inputs = map(int, size.split("x"))
    problems = batch[0] if batch else 1
    x_TI = torch.randn(2 * inputs, inputs, device=device)
    w_BOI = torch.randn(problems, outputs, inputs, device=device) / inputs**0.5
    h_BII = (x_TI.T @ x_TI).expand(problems, -1, -1).contiguous()
    del x_TI
    kernel = gptq.on_a_kernel(Integers(-8, 7), device)
    for name, bound, action in parts(w_BOI, h_BII):
        columns = name.startswith(("GPTQ", "refinement"))
        what = f"{size}, {name}" + (", kernel" if kernel else ", loop in PyTorch") * columns
        seconds, peak, found = _best(action, device, repetitions)
        yield Row(what, seconds, problems * bound, peak)
        if kernel and columns:
            with mock.patch.object(gptq, "on_a_kernel", return_value=False):
                seconds, peak, by_loop = _best(action, device, 0)
            yield Row(f"{size}, {name}, loop in PyTorch", seconds, problems * bound, peak)
            share = _unequal(_codes(found), _codes(by_loop))
            yield Row(f"{size}, {name}: {share:.3%} of the kernel's codes differ from the loop's")


def _codes(found: object) -> torch.Tensor:
    codes = found[0] if isinstance(found, tuple) else found
    assert isinstance(codes, torch.Tensor)
    return codes


def _best(action: Callable[[], object], device: torch.device, repetitions: int) -> tuple[float, float | None, object]:
    """Least seconds, peak bytes and what was found; without repetitions of the first time."""
    card = device.type == "cuda"
    taken, found = [], None
    if card:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repetitions + 1):
        found = None
        begun = time.perf_counter()
        found = action()
        if card:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken[1:] or taken), torch.cuda.max_memory_allocated() if card else None, found


def bitsandbytes_bytes(device: torch.device) -> Iterator[Row]:
    """How many of bitsandbytes' bytes for a weight of 4096 x 4096 differ between the CPU and the card."""
    if device.type != "cuda":
        return
    from bitsandbytes import functional

    w_OI = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nf4": lambda w: functional.quantize_4bit(w, blocksize=64, quant_type="nf4")[0],
        "fp4": lambda w: functional.quantize_4bit(w, blocksize=64, quant_type="fp4")[0],
        "int8": lambda w: functional.int8_vectorwise_quant(w.half())[0],
    }
    for name, pack in kinds.items():
        try:
            differ = f"{_unequal(pack(w_OI.to(device)).cpu(), pack(w_OI)):.4%} differ"
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            differ = f"not compared: {type(error).__name__}, {' '.join(str(error).split())[:120]}"
        yield Row(f"bitsandbytes {name}, bytes on the CPU and on the card: {differ}")


def _unequal(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one != other).float().mean().item()


def card_tests() -> Row:
    """The tests that need a card."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "tests"],
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - begun
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout) or [f"exit code {done.returncode}"]
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return Row(f"tests that need a card: {', '.join(counts)}", taken)


def rows(given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The table's rows."""
    if "solvers" not in given.without:
        for size in given.sizes:
            yield from solvers(device, size, given.repetitions)
    if "bitsandbytes" not in given.without:
        yield from bitsandbytes_bytes(device)
    if "stack" not in given.without:
        with tempfile.TemporaryDirectory(prefix="quantmill-stack-") as place:
            yield from gpu_stack.rows(Path(place), given, device)
    if "tests" not in given.without:
        yield card_tests()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=3)
    gpu_stack.add_arguments(parser)
    parser.add_argument("--without", nargs="+", choices=PARTS, default=())
    given = parser.parse_args()
    gpu_stack.print_table(given, HEADER, lambda device: (row.cells for row in rows(given, device)))


if __name__ == "__main__":
    main()
