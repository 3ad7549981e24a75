"""Which recipe to choose: rules, and what was measured in their place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.recommend import EIGHT_BITS, bits_for_each_weight, expected_kl, recommend
from pipeline.zoo import shipped
from workers.spec.recipes import LibraryRecipe

RECIPES = [shipped.recipe(name) for name in shipped.recipe_names()]
BILLION = 10**9
memories = st.none() | st.integers(1, 200 * BILLION)
names = st.sampled_from([recipe.name for recipe in RECIPES if recipe.method != "keep"])
measurements = st.dictionaries(names, st.floats(1e-6, 5).map(lambda kl: SimpleNamespace(kl_mean=kl)), max_size=6)


def test_every_shipped_recipe_that_makes_codes_has_a_rule():
    rated = {one.recipe for one in recommend(8 * BILLION, None, None, "inference", RECIPES, {})}
    own = [recipe for recipe in RECIPES if not isinstance(recipe, LibraryRecipe)]
    assert rated == {recipe.name for recipe in own if recipe.method not in ("keep", "transformers")}
    # What a library makes is proposed where it was seen to work.
    seen = {"torchao-int8wo": SimpleNamespace(kl_mean=0.001)}
    assert rated | set(seen) == {one.recipe for one in recommend(8 * BILLION, None, None, "inference", RECIPES, seen)}


@pytest.mark.parametrize(("name", "gigabytes"), [("bnb-int8", 1.0), ("bnb-nf4", 0.5), ("gptq-w4-g128", 0.5)])
def test_bytes_for_each_billion_parameters_are_near_the_rule_of_the_field(name: str, gigabytes: float):
    recipe = shipped.recipe(name)
    assert bits_for_each_weight(recipe.scheme, recipe.format) / 8 == pytest.approx(gigabytes, rel=0.07)


@given(st.integers(10**6, 10**12), memories, st.sampled_from(["inference", "qlora", "production"]), measurements)
def test_what_fits_comes_first_and_then_the_least_loss(parameters, memory, use, measured):
    best = recommend(parameters, memory, None, use, RECIPES, measured)
    assert [one.fits for one in best] == sorted((one.fits for one in best), reverse=True)
    assert all(one.fits == (memory is None or one.bytes <= int(0.9 * memory)) for one in best)
    if use == "inference":
        losses = [one.kl_mean for one in best if one.fits]
        assert losses == sorted(losses)
    for one in best:
        assert (one.source == "measured") == (one.recipe in measured)
        assert one.source == "rule" or one.kl_mean == measured[one.recipe].kl_mean


def test_nf4_with_double_quantization_is_for_qlora():
    best = recommend(7 * BILLION, 12 * BILLION, None, "qlora", RECIPES, {})
    assert [best[0].recipe, best[0].source] == ["bnb-nf4", "rule"]
    assert {one.recipe for one in best} == {"bnb-nf4", "bnb-fp4", "bnb-int8"}


def test_production_prefers_eight_bits_where_they_fit():
    by_name = {recipe.name: recipe for recipe in RECIPES}
    best = recommend(7 * BILLION, 24 * BILLION, "vllm", "production", RECIPES, {})
    assert by_name[best[0].recipe].scheme.family in EIGHT_BITS
    tight = recommend(7 * BILLION, 5 * BILLION, "vllm", "production", RECIPES, {})
    assert by_name[tight[0].recipe].scheme.family in ("w4", "nf4")


def test_what_was_measured_replaces_its_rule_and_scales_the_others():
    measured = {"gptq-w4-g128": SimpleNamespace(kl_mean=3 * expected_kl(shipped.recipe("gptq-w4-g128")))}
    found = {one.recipe: one for one in recommend(7 * BILLION, None, None, "inference", RECIPES, measured)}
    assert found["gptq-w4-g128"].source == "measured"
    assert "measured" in found["gptq-w4-g128"].why
    assert found["gptq-w4-g128"].retention is None
    assert found["bnb-nf4"].kl_mean == pytest.approx(3 * expected_kl(shipped.recipe("bnb-nf4")))


def test_an_unknown_runtime_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"unknown runtime, got 'vlm'; did you mean 'vLLM'\?"):
        recommend(7 * BILLION, None, "vlm", "inference", RECIPES, {})
