"""What a recipe of method transformers names is looked up in the installed transformers, and refused in its words."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from pipeline.zoo import shipped
from tests.workers import jobs
from workers.engines import hf_registry
from workers.errors import PreflightError, UnsupportedRecipe
from workers.spec.engines import RegistryRequest
from workers.spec.job import ModelPin, fingerprint
from workers.spec.recipes import TransformersRecipe

CONFIGS = sorted({cls.__name__ for cls in AUTO_QUANTIZATION_CONFIG_MAPPING.values()})
TORCHAO = [shipped.recipe(name) for name in shipped.recipe_names() if name.startswith("torchao-")]


def recipe_of(config: str, **arguments: Any) -> TransformersRecipe:
    scheme = {"type": "transformers", "config": config, "arguments": arguments}
    made = jobs.recipe(name="r", method="transformers", scheme=scheme, format="hf-quantizer")
    assert isinstance(made, TransformersRecipe)
    return made


@pytest.mark.parametrize("config", CONFIGS)
def test_every_quantizer_of_the_installed_transformers_is_judged(config: str) -> None:
    """Whatever transformers has, also what later ones add: it can be made, or is refused with what to do."""
    answer = hf_registry.judged(RegistryRequest(recipes=(recipe_of(config),), tried=False))
    for why in (*answer.never.values(), *answer.here.values()):
        assert config in why
        assert "; " in why or "pip install" in why, "no remedy"


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        ("TorchaoConfig", {}, r"has no quantizer for 'TorchaoConfig'; did you mean 'TorchAoConfig'\? It has A"),
        ("QuantoConfig", {"weight": "int8"}, r"QuantoConfig has no argument 'weight'; did you mean 'weights'\?"),
        ("QuantoConfig", {"weights": "int9"}, r"QuantoConfig refuses them: .*int9"),
        ("QuantoConfig", {"weights": "int8"}, r"is not serializable \(QuantoHfQuantizer.is_serializable\).*; choose"),
        ("AqlmConfig", {}, r"can't quantize with AqlmConfig: .*pre-quantized.*; take a published checkpoint"),
        ("TorchAoConfig", {"quant_type": {"default": {"_type": "Int9Config"}}}, r"TorchAoConfig refuses them"),
    ],
)
def test_what_no_machine_can_make_is_refused_with_the_remedy(config: str, arguments: Any, says: str) -> None:
    with pytest.raises(UnsupportedRecipe, match=says):
        hf_registry.validate(recipe_of(config, **arguments))


def test_a_missing_package_is_the_machines_fault() -> None:
    with pytest.raises(PreflightError, match="pip install"):
        hf_registry.validate(recipe_of("EetqConfig"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("eetq-int8", "pip install kernels"), ("fbgemm-fp8", "requires a GPU or XPU; run it on a"), ("higgs-w4", "GPU")],
)
def test_recipes_for_a_gpu_are_refused_without_one(name: str, says: str) -> None:
    if hf_registry.device() == "cuda":
        pytest.skip("there is one")
    recipe = shipped.recipe(name)
    assert isinstance(recipe, TransformersRecipe)
    with pytest.raises(PreflightError, match=says):
        hf_registry.validate(recipe)


def test_modules_that_stay_are_passed_under_the_configs_own_name() -> None:
    four = hf_registry.config_of(recipe_of("BitsAndBytesConfig", load_in_4bit=True).scheme, ["lm_head"])
    assert four.llm_int8_skip_modules == ["lm_head"]
    both = recipe_of("HiggsConfig", modules_to_not_convert=["a"]).scheme
    assert hf_registry.config_of(both, ["b"]).modules_to_not_convert == ["a", "b"]
    with pytest.raises(UnsupportedRecipe, match="ignore: GPTQConfig has no list of modules to leave"):
        hf_registry.config_of(recipe_of("GPTQConfig", bits=4).scheme, ["b"])


@pytest.mark.slow
def test_a_tiny_model_tells_what_runs_here() -> None:
    answer = hf_registry.judged(RegistryRequest(recipes=(*TORCHAO, recipe_of("HqqConfig"))))
    # Not implemented in transformers 5.23; without hqq, that package is named first.
    assert "not available yet" in answer.never.get("r", "") or "hqq" in answer.here.get("r", "")
    runs = {recipe.name for recipe in TORCHAO} - set(answer.here) - set(answer.never)
    assert runs >= {"torchao-int8wo", "torchao-int8dyn", "torchao-float8wo", "torchao-8da4w"}
    if hf_registry.device() == "cpu":
        assert "mslk" in answer.here["torchao-int4wo"]
        assert answer.here["torchao-float8dyn"].endswith(
            "run it on a node with a GPU, or choose a recipe that runs here"
        )


def test_only_what_the_quantizer_does_is_part_of_the_identity() -> None:
    pin, recipe = ModelPin(id="org/name", revision="0" * 40), shipped.recipe("torchao-int8wo")
    other = recipe.scheme.model_copy(update={"expected": recipe.scheme.expected.model_copy(update={"family": "w4"})})
    changed = recipe.scheme.model_copy(update={"arguments": {}})
    prints = [
        fingerprint(pin, recipe.model_copy(update={"scheme": scheme}), None, None)
        for scheme in (recipe.scheme, other, changed)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_words_of_a_scheme_are_its_names_and_numbers() -> None:
    assert shipped.recipe("torchao-8da4w").scheme.words() == (
        "TorchAoConfig Int8DynamicActivationIntxWeightConfig torch.dtype int4 PerGroup group_size=32"
    )
    assert transformers.__version__.startswith("5.")
