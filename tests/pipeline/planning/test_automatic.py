"""Recipes that a budget chooses for each model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.planning.automatic import load
from tests.workers.jobs import ZOO
from workers.errors import ZooError

MODELS = ZOO / "models"


def zoo_file(folder: Path, **changed: object) -> Path:
    text = {"dataset": {"path": "text", "data_files": [str(ZOO / "text" / "heldout.txt")]}}
    models = [{"id": str(MODELS / name)} for name in ("llama-tiny", "qwen3-moe-tiny")]
    raw = {
        "name": "auto",
        "models": models,
        "recipes": "auto",
        "budget": {"memory": "16GiB"},
        "verify": text,
        **changed,
    }
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump({**raw, **changed}))
    return path


def test_each_model_gets_the_best_that_fits(tmp_path: Path) -> None:
    zoo = load(zoo_file(tmp_path, budget={"memory": "4.5MB", "runtime": "vLLM", "best": 2}))
    llama, mixture = zoo.models
    assert len(llama.recipes) == len(mixture.recipes) == 2
    assert {recipe.name for recipe in zoo.resolved_recipes} == {*llama.recipes, *mixture.recipes}
    assert all("w8" not in name for name in llama.recipes), "eight bits take 5 MB"
    assert zoo.calibration is not None


def test_a_card_and_a_use_are_a_budget_too(tmp_path: Path) -> None:
    zoo = load(zoo_file(tmp_path, budget={"gpu": "T4", "use": "qlora"}))
    assert all(set(model.recipes) <= {"bnb-nf4", "bnb-int8", "bnb-fp4"} for model in zoo.models)


def test_a_zoo_that_names_its_recipes_stays_as_it_is(tmp_path: Path) -> None:
    zoo = load(zoo_file(tmp_path, recipes=["bnb-nf4"], budget=None))
    assert [recipe.name for recipe in zoo.resolved_recipes] == ["bnb-nf4"]
    assert all(model.recipes == () for model in zoo.models)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": {"memory": "1MiB"}}, "no recipe of '.*llama-tiny' fits 1MiB; raise it"),
        ({"budget": {"gpu": "L5"}}, r"budget\.gpu: unknown card, got 'L5'; known are V100"),
        ({"budget": {"memory": "lots"}}, r"budget\.memory: got 'lots', expected a size"),
        ({"budget": {"usage": "qlora"}}, "unknown key, got 'usage'"),
        ({"budget": {"runtime": "mlx"}}, "did you mean 'mlx-lm'"),
        ({"models": [{"id": "gone/nowhere/x"}]}, "no such folder"),
    ],
)
def test_what_a_budget_cannot_choose_is_named(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError if "models" not in changed else Exception, match=said):
        load(zoo_file(tmp_path, **changed))
