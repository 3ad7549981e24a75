"""Engines with a registry are asked in a process, once; a process that dies is told of its recipe alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline import registry
from pipeline.cli.main import main
from pipeline.zoo import shipped
from tests.workers import jobs
from workers.machine import child
from workers.spec.engines import ENGINES, RegistryAnswer


def test_recipes_without_a_registry_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "run", None)
    assert registry.ask([shipped.recipe("rtn-w4-g128"), shipped.recipe("bnb-nf4")]) == RegistryAnswer()


def dies_of_higgs(request: str) -> str:
    """A registry whose library ends the process for one of the recipes."""
    if "HiggsConfig" in request:
        raise SystemExit(3)
    return RegistryAnswer(never={"eetq-int8": "refused; mend it"}).model_dump_json()


def test_a_library_that_ends_the_process_costs_its_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ENGINES["transformers"], asks=f"{__name__}:dies_of_higgs")
    monkeypatch.setitem(ENGINES, "transformers", row)
    answer = registry.ask([shipped.recipe("eetq-int8"), shipped.recipe("higgs-w4")])
    assert answer.never == {"eetq-int8": "refused; mend it"}
    assert set(answer.here) == {"higgs-w4"}
    assert answer.here["higgs-w4"].endswith("choose another recipe")


@pytest.mark.slow
def test_the_plan_refuses_what_no_machine_makes_and_says_what_this_one_lacks(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo.yaml"
    zoo.write_text(
        f"name: z\nmodels: [{{id: {jobs.ZOO}/models/llama-tiny}}]\n"
        "recipes: [fbgemm-fp8, {name: aqlm, method: transformers, scheme: {type: transformers, config: AqlmConfig}}]\n"
        f"verify: {{dataset: {{path: text, data_files: [{jobs.ZOO}/text/heldout.txt]}}}}\n"
    )
    result = CliRunner().invoke(main, ["plan", str(zoo), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "can't be made: llama-tiny aqlm:" in result.output
    assert "pre-quantized" in result.output
    if not Path("/dev/nvidia0").exists():
        assert "FbgemmFp8Config: Using fbgemm fp8 quantization requires a GPU" in result.output
