"""``import quantmill``: the package's few functions, as a script uses them."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quantmill
from tests.pipeline.runs import MODELS, ROOT, TEXT
from workers.errors import ZooError

ZOO = {
    "name": "small",
    "models": [{"id": str(MODELS / "llama-tiny")}],
    "recipes": ["rtn-w4-g128"],
    "verify": {
        "dataset": {"path": "text", "data_files": [str(TEXT / "heldout.txt")]},
        "tokens": 2048,
        "sequence_length": 256,
    },
}


@pytest.mark.slow
def test_plan_run_and_verify(tmp_path: Path) -> None:
    planned = quantmill.plan(ZOO, out=tmp_path / "runs")
    assert [(cell.order.recipe.name, cell.skipped) for cell in planned.artifacts] == [("rtn-w4-g128", False)]
    results = quantmill.run(ZOO, out=tmp_path / "runs")
    (artifact,) = results.artifacts
    assert (artifact.status, results.status) == ("verified", "ok")
    assert artifact.metrics
    assert (tmp_path / "runs" / results.run_id / "results.json").is_file()
    assert quantmill.plan(ZOO, out=tmp_path / "runs").artifacts[0].skipped
    verdict = quantmill.verify(
        artifact.path or "", MODELS / "llama-tiny",
        text=TEXT / "heldout.txt", tokens=2048, sequence_length=256, out=tmp_path / "runs",
    )  # fmt: skip
    assert verdict.accepted
    assert verdict.metrics
    assert verdict.metrics.kl_mean == pytest.approx(artifact.metrics.kl_mean, rel=1e-3)


def test_a_wrong_zoo_is_an_error_and_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="did you mean 'recipes'"):
        quantmill.plan({**ZOO, "recipe": []})
    with pytest.raises(ZooError, match="no such file"):
        quantmill.run(tmp_path / "zoo.yaml", out=tmp_path / "runs")
    gone = {**ZOO, "verify": {"dataset": {"path": "text", "data_files": [str(tmp_path / "gone.txt")]}}}
    with pytest.raises(ZooError, match=r"no such file, got '.*gone.txt'"):
        quantmill.run(gone, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_recipes_are_those_of_the_command() -> None:
    assert {row.name for row in quantmill.recipes()} >= {"gptq-w4-g128", "bnb-nf4"}


def test_what_is_exported_is_documented_and_light() -> None:
    for name in quantmill.__all__:
        assert inspect.getdoc(getattr(quantmill, name)), name
    code = "import sys, quantmill; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
