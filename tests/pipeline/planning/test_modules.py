"""Patterns of modules, layers by number, and the plan's list of modules against what is really quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.main import main
from pipeline.planning import fitting, sources
from pipeline.planning.modules import modules_of, with_layers_of
from pipeline.planning.sources import PinnedModel
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.errors import UnsupportedRecipe
from workers.formats.decoded import Decoded, open_decoded
from workers.quantize.one_pass import quantize
from workers.spec.job import ModelPin, fingerprint
from workers.spec.patterns import LAYERS, chosen_layers, in_ranges, is_among

RTN = {"name": "r", "method": "rtn", "scheme": {"type": "int", "bits": 4, "group_size": 32}}


def source_of(model: str) -> PinnedModel:
    return sources.resolve(ModelEntry(id=model), jobs.ZOO / "models")


def quantized(source: PinnedModel, recipe: Any) -> int:
    return sum(row.count for row in modules_of(source, recipe) if row.scheme)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_layers_come_back_from_their_ranges(case: tuple[int, set[int]]) -> None:
    count, numbers = case
    text = in_ranges(numbers)
    assert re.match(LAYERS, text)
    assert chosen_layers(text, count) == numbers
    assert {number for number in range(count) if is_among(text, number)} == numbers


@given(st.integers(1, 100), st.data())
def test_numbers_from_the_end_are_pythons(count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(-count, count - 1))
    assert chosen_layers(str(number), count) == {range(count)[number]}


@pytest.mark.parametrize(
    ("layers", "says"), [("4", "'4' is beyond them, the model has layers 0 to 3"), ("3-1", "'3-1' runs backwards")]
)
def test_layers_that_a_model_does_not_have_are_refused(layers: str, says: str) -> None:
    with pytest.raises(UnsupportedRecipe, match=says):
        with_layers_of(source_of("llama-tiny"), jobs.recipe(**RTN, layers=layers))


@pytest.mark.parametrize("layers", ["", "one", "1..3", "0-", ","])
def test_layers_that_are_no_numbers_are_refused(layers: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        jobs.recipe(**RTN, layers=layers)


def test_the_head_in_include_is_refused_with_the_format_that_holds_it() -> None:
    with pytest.raises(ValueError, match=r"include: 'lm_head' is outside of the layers; set outside: \{head: .*mlx"):
        jobs.recipe(**RTN, include=("*", "lm_head"))


def test_a_bad_expression_is_named_by_its_field() -> None:
    with pytest.raises(ValueError, match=r"include: 're:\(' is no regular expression"):
        jobs.recipe(**RTN, include=("re:(",))


def test_patterns_that_are_not_set_are_no_part_of_the_identity() -> None:
    pin = ModelPin(id="org/name", revision="0" * 40)
    plain, named = jobs.recipe(**RTN), jobs.recipe(**RTN, layers="0")
    assert "layers" in plain.model_dump()
    assert fingerprint(pin, plain, None, None) != fingerprint(pin, named, None, None)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ({}, 28),
        ({"layers": "0,-1"}, 14),
        ({"include": ("*.mlp.*",)}, 12),
        ({"include": ("*_proj",), "layers": "1-2", "ignore": ("re:.*down",)}, 12),
    ],
)
def test_the_list_is_what_is_quantized(chosen: dict[str, Any], count: int, tmp_path: Path) -> None:
    source = source_of("llama-tiny")
    base = shipped.recipe("bnb-nf4").model_dump(mode="json")
    recipes = [
        with_layers_of(source, jobs.recipe(**{**RTN, **chosen})),
        with_layers_of(source, jobs.recipe(**{**base, **chosen})),
    ]
    made, _ = quantize(jobs.job(jobs.ZOO / "models" / "llama-tiny", tmp_path, *recipes), jobs.ZOO / "models/llama-tiny")
    for recipe, artifact in zip(recipes, made, strict=True):
        assert artifact.error is None, artifact.error
        assert quantized(source, recipe) == count
        with open_decoded(Path(artifact.path)) as opened:
            assert isinstance(opened, Decoded)
            assert len(opened.quantized) == count


@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "qwen3-moe-tiny"])
@pytest.mark.parametrize("name", [name for name in shipped.recipe_names() if not name.startswith("keep-")])
def test_every_matrix_is_listed_once(model: str, name: str) -> None:
    source, recipe = source_of(model), shipped.recipe(name)
    rows = modules_of(source, recipe)
    matrices = [t for t in source.tensors if len(t.shape) == 2 and t.name.endswith(".weight")]
    assert sum(row.count for row in rows) == len(matrices)
    assert all(row.scheme or row.why for row in rows), "what stays says why"


def test_a_mix_of_ggml_has_a_type_for_embeddings_and_head_too() -> None:
    rows = modules_of(source_of("llama-tiny"), shipped.recipe("gguf-q4_k_m"))
    assert all(row.scheme for row in rows)


def test_a_recipe_that_leaves_nothing_is_refused_with_where_to_look() -> None:
    problems = list(fitting.recipe_problems(source_of("llama-tiny"), jobs.recipe(**RTN, include=("*.nothing",))))
    assert "is left to quantize" in problems[0]
    assert "quantmill plan --modules" in problems[0]


def test_the_command_prints_what_matches(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo.yaml"
    zoo.write_text(
        f"name: z\nmodels: [{{id: {jobs.ZOO}/models/llama-tiny}}]\n"
        "recipes:\n- {name: mine, method: rtn, format: compressed-tensors, layers: '0,-1',\n"
        "   ignore: [lm_head, '*.k_proj'], scheme: {type: int, bits: 4, group_size: 32}}\n"
        f"verify: {{dataset: {{path: text, data_files: [{jobs.ZOO}/text/heldout.txt]}}}}\n"
    )
    result = CliRunner().invoke(main, ["plan", str(zoo), "--out", str(tmp_path / "out"), "--modules"])
    assert result.exit_code == 0, result.output
    lines = {" ".join(line.split()) for line in result.output.splitlines()}
    words = "4-bit integers, symmetric, one scale for each 32 inputs"
    assert f"model.layers.{{0,3}}.mlp.down_proj 2 256 x 768 {words}" in lines
    assert "model.layers.{1-2}.mlp.down_proj 2 256 x 768 stays layers: 0,3" in lines
    assert "model.layers.{0-3}.self_attn.k_proj 4 128 x 256 stays ignore: *.k_proj" in lines
    assert "lm_head 1 2048 x 256 stays outside of the decoder's layers" in lines
