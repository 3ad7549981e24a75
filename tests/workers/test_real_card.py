"""What needs a real card: bitsandbytes' own kernels there, and the bytes of a card. `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.jobs import ZOO, job
from workers.machine.files import file_sha256
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


@pytest.mark.parametrize("recipe", BITSANDBYTES)
def test_an_artifact_of_bitsandbytes_is_accepted_on_the_card(recipe: str, tmp_path: Path) -> None:
    result = run_stage(made(tmp_path, recipe), Stage.VERIFY, recipe)
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    print(recipe, result.manifest.verdict.runtime, result.memory)


def test_the_same_card_makes_the_same_bytes(tmp_path: Path) -> None:
    assert weights(made(tmp_path / "one", *CALIBRATED)) == weights(made(tmp_path / "two", *CALIBRATED))
