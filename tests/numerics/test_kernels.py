"""Kernels against the loops that they stand for, in Triton's interpreter: TRITON_INTERPRET=1, no card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.numerics import gptq, grids
from workers.numerics.rounding import code_range

ROOT = Path(__file__).parents[2]
# Where the Makefile installs Triton, if the environment has none.
TRITON = ROOT / ".venv-triton"
CASES = {
    # Problems, outputs, inputs, group size, bits, zero points, columns by activation, only below the diagonal.
    "one problem": (1, 40, 192, 64, 4, False, False, True),
    "zero points": (1, 33, 256, 128, 4, True, False, True),
    "stacked, by activation": (3, 17, 160, 32, 3, True, True, True),
    "eight bits": (2, 64, 128, 128, 8, False, True, True),
    "two bits, one group": (1, 16, 96, 96, 2, True, False, True),
    "refinement": (1, 40, 192, 64, 4, False, False, False),
    "refinement, stacked with zero points": (2, 24, 300, 100, 4, True, False, False),
    "E2M1, by activation": (2, 33, 192, 16, "E2M1", False, True, True),
    "E2M1, refinement": (1, 24, 160, 32, "E2M1", False, False, False),
    "E4M3": (1, 24, 160, 32, "E4M3", False, True, True),
}
LARGEST = {"E2M1": 6.0, "E4M3": 448.0}


def problem(
    problems: int, outputs: int, inputs: int, size: int, bits: int | str, zeros: bool, order: bool, lower: bool
) -> dict[str, Any]:
    """Arguments of ``gptq.sweep``."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    x_BTI = torch.randn(problems, 2 * inputs, inputs, generator=generator)
    w_BOI = torch.randn(problems, outputs, inputs, generator=generator)
    h_BII = x_BTI.mT @ x_BTI
    factor = gptq.factorize(h_BII, activation_order=order, damping=0.01)
    columns = torch.arange(inputs).expand(problems, -1) if factor.order_BI is None else factor.order_BI
    largest = (2**bits - 1) / 2 if isinstance(bits, int) else LARGEST[bits]
    scale = w_BOI.unflatten(2, (-1, size)).abs().amax(-1) / largest
    mixing = factor.mixing_BII
    if not lower:
        mixing = h_BII / h_BII.diagonal(dim1=1, dim2=2)[..., None]
        mixing.diagonal(dim1=1, dim2=2).zero_()
    wt_BIO = torch.stack([w[:, order].mT for w, order in zip(w_BOI, columns, strict=True)]).contiguous()
    return {
        "wt_BIO": wt_BIO,
        "mixing_BII": mixing,
        # The refinement begins with the errors of rounding down to a coarse grid.
        "error_BIO": torch.zeros_like(wt_BIO) if lower else wt_BIO - wt_BIO.round(),
        "scale_BOG": scale,
        "zero_BOG": torch.randint(-2, 2, scale.shape, generator=generator).float() if zeros else None,
        "group_BI": columns // size,
    }


def against_the_loop() -> dict[str, dict[str, float]]:
    """For each case: codes, codes that differ, and the loss in the kernel's errors as a multiple of the loop's."""
    from workers.numerics.kernels import columns

    found = {}
    for name, case in CASES.items():
        given, lower = problem(*case), case[-1]
        grid = getattr(grids, case[4]) if isinstance(case[4], str) else grids.Integers(*code_range(case[4]))
        loop, kernel = (
            {**given, "error_BIO": given["error_BIO"].clone(), "mixing_BII": given["mixing_BII"].clone()} for _ in "ab"
        )
        want = gptq.sweep(**loop, nearest=grid, lower=lower)
        got = columns.sweep(**kernel, grid=grid, lower=lower)
        errors = kernel["error_BIO"].square().sum() / loop["error_BIO"].square().sum()
        found[name] = {"codes": want.numel(), "differ": int((want != got).sum()), "errors": float(errors)}
    return found


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, float]]:
    if importlib.util.find_spec("triton") is None and not TRITON.is_dir():
        pytest.skip("no Triton: its interpreter compares the kernels with their loops (`make test-slow` installs it)")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path, str(TRITON)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.test_kernels"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_the_loops_codes(compared: dict[str, dict[str, float]], case: str) -> None:
    """Sums have another order, so a target in the middle between two codes may fall to the other side, and its error
    moves what follows: at most one code in a thousand, and no more error in all."""
    found = compared[case]
    assert found["differ"] <= found["codes"] / 1000, found
    assert abs(found["errors"] - 1) < 1e-3, found


def test_only_a_card_with_triton_takes_the_kernel_for_grids_by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    card, cpu = torch.device("cuda", 0), torch.device("cpu")
    for there in (True, False):
        monkeypatch.setattr(gptq, "find_spec", lambda name, there=there: object() if there else None)
        for grid in (grids.Integers(-8, 7), grids.E2M1, grids.E4M3):
            assert gptq.on_a_kernel(grid, card) is there
            assert not gptq.on_a_kernel(grid, cpu)
        assert not gptq.on_a_kernel(lambda code: code, card)


if __name__ == "__main__":
    print(json.dumps(against_the_loop()))
