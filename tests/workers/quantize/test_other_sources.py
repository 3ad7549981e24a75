"""What holds for a plain model holds for a multimodal one, and for one that is stored in FP8."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

from tests.workers.jobs import ZOO, job
from tests.workers.multimodal import save_llava
from tests.workers.quantize.test_pass import digests, made_of, own_stream, quantize_and_die
from tests.workers.quantize.test_spread import assert_same_artifact, at_once, spread_over
from tests.workers.test_low_bit import decoded_job
from workers.spec.job import Job
from workers.spec.workspace import artifact_folder

RECIPES = ("gptq-w4-g128", "bnb-nf4")
pytestmark = pytest.mark.night


@pytest.fixture(scope="module", params=["multimodal", "fp8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "multimodal":
        return request.param, save_llava(place / "model")
    of = job(ZOO / "models" / "llama-tiny", place, "fp8-block")
    made_of(of)
    return request.param, artifact_folder(of.workspace, of.orders[0])


def jobs_of(source: tuple[str, Path], place: Path, *recipes: object) -> Job:
    kind, folder = source
    return (job if kind == "multimodal" else decoded_job)(folder, place, *recipes)  # type: ignore[operator]


def test_the_same_job_makes_the_same_bytes_also_after_a_kill(source: tuple[str, Path], tmp_path: Path) -> None:
    recipes = (*RECIPES, own_stream())
    first, torn = (jobs_of(source, tmp_path / place, *recipes) for place in ("first", "torn"))
    made_of(first)
    killed = multiprocessing.get_context("spawn").Process(target=quantize_and_die, args=(torn, 1))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    made_of(torn)
    assert digests(torn) == digests(first)


def test_parts_make_what_one_pass_makes(source: tuple[str, Path], tmp_path: Path) -> None:
    plain, parted = (jobs_of(source, tmp_path / place, *RECIPES) for place in ("plain", "parted"))
    assert [made.error for made in at_once(plain).values()] == [None] * 2
    assert [made.error for made in spread_over(parted, 2).values()] == [None] * 2
    for name in RECIPES:
        assert_same_artifact(plain, parted, name)
