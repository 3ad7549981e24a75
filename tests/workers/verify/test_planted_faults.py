"""A good checkpoint, broken in many ways: each is rejected, and the verdict names the cause."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.workers.faults import PLANTED
from tests.workers.jobs import ZOO, job, recipe
from workers.run import run_stage
from workers.spec.job import Job, Manifest, Outcome, Stage, Thresholds
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

pytestmark = pytest.mark.usefixtures("forked")

GATES = Thresholds(kl_mean=0.2, top1_agreement=0.8, perplexity_ratio=1.2, runtime_logit_difference=0.1)
OWN: dict[str, Recipe] = {
    "rtn-w4-gptq": recipe(
        name="rtn-w4-gptq",
        method="rtn",
        scheme={"bits": 4, "group_size": 64, "symmetric": False, "indivisible": "keep"},
        format="gptq",
    )
}


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A job for each model, with all recipes of its faults made."""
    found = {}
    for model in {fault.model for fault in PLANTED.values()}:
        names = dict.fromkeys(fault.recipe for fault in PLANTED.values() if fault.model == model)
        recipes = [OWN.get(name, name) for name in names]
        of = job(ZOO / "models" / model, tmp_path_factory.mktemp(model), *recipes, thresholds=GATES)
        result = run_stage(of, Stage.QUANTIZE)
        assert [made.error for made in result.artifacts] == [None] * len(names), result.failure
        found[model] = of
    return found


def verified(of: Job, name: str) -> Manifest:
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    return result.manifest


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_rejected_by_its_name(fault: str, workspaces: dict[str, Job], tmp_path: Path) -> None:
    planted = PLANTED[fault]
    good = workspaces[planted.model]
    order = good.order(planted.recipe)
    of = good.model_copy(update={"workspace": str(tmp_path)})
    shutil.copytree(Path(good.workspace) / "references", tmp_path / "references")
    for place in artifact_folder(good.workspace, order).parent.glob(f"{artifact_folder('', order).name}*"):
        copy = shutil.copytree if place.is_dir() else shutil.copy
        copy(place, (tmp_path / "artifacts").mkdir(exist_ok=True) or tmp_path / "artifacts" / place.name)
    planted.plant(artifact_folder(tmp_path, order))
    manifest = verified(of, planted.recipe)
    assert not manifest.verdict.accepted
    assert manifest.verdict.outcome is Outcome.REGRESSION
    assert planted.said in " | ".join(manifest.verdict.reasons)


def test_there_are_many() -> None:
    assert f"{len(PLANTED)} planted faults" in (Path(__file__).parents[3] / "README.md").read_text()
