"""What needs a real card: kernels of ours and of bitsandbytes there, and the bytes of a card. `make test-gpu`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import Tensor

from tests.numerics.test_kernels import CASES, problem
from tests.workers.jobs import ZOO, job
from workers.machine.files import file_sha256
from workers.numerics import gptq, grids
from workers.numerics.rounding import code_range
from workers.run import run_stage
from workers.spec.job import Job, Stage
from workers.spec.workspace import artifact_folder

pytestmark = pytest.mark.gpu
LLAMA = ZOO / "models" / "llama-tiny"
BITSANDBYTES = ("bnb-nf4", "bnb-fp4", "bnb-int8")
CALIBRATED = ("gptq-w4-g128", "awq-w4-g128", "fp8-block", "nvfp4", "hqq-w4-g64")


def weights(of: Job) -> dict[str, str]:
    """The sha256 of each artifact's weights, by recipe."""
    return {
        order.recipe.name: file_sha256(artifact_folder(of.workspace, order) / "model.safetensors")
        for order in of.orders
    }


def made(place: Path, *recipes: str) -> Job:
    of = job(LLAMA, place, *recipes)
    result = run_stage(of, Stage.QUANTIZE)
    assert not result.failure, result.failure
    assert [artifact.error for artifact in result.artifacts] == [None] * len(recipes)
    assert result.memory.device, "it ran on the card"
    return of


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton: columns are rounded by the loop, on a card too")
@pytest.mark.parametrize("case", CASES)
def test_the_column_kernel_gives_the_loops_codes(case: str) -> None:
    """Compiled for this card, not interpreted. Sums have another order there: codes that are nearly tied may differ."""
    from workers.numerics.kernels import columns

    given, bits, lower = problem(*CASES[case]), CASES[case][4], CASES[case][-1]
    grid = getattr(grids, bits) if isinstance(bits, str) else grids.Integers(*code_range(bits))
    here = {**given, "error_BIO": given["error_BIO"].clone()}
    there = {name: one.cuda() if isinstance(one, Tensor) else one for name, one in given.items()}
    want = gptq.sweep(**here, nearest=grid, lower=lower)
    got = columns.sweep(**there, grid=grid, lower=lower).cpu()
    assert (want != got).sum() <= want.numel() / 200
    errors = [float(of["error_BIO"].square().sum()) for of in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


@pytest.mark.parametrize("recipe", BITSANDBYTES)
def test_an_artifact_of_bitsandbytes_is_accepted_on_the_card(recipe: str, tmp_path: Path) -> None:
    result = run_stage(made(tmp_path, recipe), Stage.VERIFY, recipe)
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    print(recipe, result.manifest.verdict.runtime, result.memory)


def test_the_same_card_makes_the_same_bytes(tmp_path: Path) -> None:
    assert weights(made(tmp_path / "one", *CALIBRATED)) == weights(made(tmp_path / "two", *CALIBRATED))
