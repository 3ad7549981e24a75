"""What a plan refuses by names and shapes, and what it advises."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.planning.fitting import model_problem, recipe_problems
from pipeline.planning.sources import PinnedModel
from tests.workers.jobs import recipe
from workers.spec.job import ModelPin
from workers.spec.tensors import TensorHeader

PIN = ModelPin(id="org/model", revision="0" * 40)
INT4 = {"bits": 4, "group_size": 128}


def model(model_type: str = "llama", **shapes: tuple[int, int]) -> PinnedModel:
    tensors = tuple(TensorHeader(f"model.layers.0.{name}.weight", shape, "BF16") for name, shape in shapes.items())
    return PinnedModel(PIN, {"model_type": model_type}, tensors, name="model")


def problems(source: PinnedModel, **definition: Any) -> list[str]:
    return list(recipe_problems(source, recipe(name="mine", method="gptq", **definition)))


def test_an_override_may_be_all_that_keeps_its_scheme() -> None:
    narrow = model(q_proj=(576, 576), down_proj=(576, 1536))
    scheme = {**INT4, "indivisible": "channel"}
    override = {"modules": ["*.down_proj"], "scheme": {"bits": 8, "group_size": 128}}
    assert problems(narrow, scheme=scheme, overrides=[override]) == []
    assert problems(narrow, scheme=scheme) == []
    (refused,) = problems(model(q_proj=(576, 576)), scheme=scheme)
    assert "group size 128 doesn't divide the layer widths of 'org/model', got [576] (of [576])" in refused


def test_a_pickled_model_of_a_conv1d_family_is_refused_before_it_is_fetched() -> None:
    (refused,) = problems(model("gpt2"), scheme=INT4)
    assert "its layers of 'org/model' are Conv1D" in refused
    assert problems(model("llama"), scheme=INT4) == []


def test_formats_whose_checkpoints_of_a_family_are_not_loaded_are_refused_with_those_that_are() -> None:
    float8 = {"method": "rtn", "scheme": {"type": "fp8"}}
    joined, split = model("kimi_linear", q_proj=(128, 128)), model("molmo2", q_proj=(128, 128))
    (refused,) = problems(joined, scheme=INT4)
    assert "fails to join while it loads codes of integers in this format; choose type: fp8, or format: gptq" in refused
    assert list(recipe_problems(joined, recipe(name="mine", **float8))) == []
    assert problems(joined, scheme=INT4, format="gptq") == []
    for definition in ({"method": "gptq", "scheme": INT4}, float8):
        (refused,) = recipe_problems(split, recipe(name="mine", **definition))
        assert "fails to split while it loads this format; choose format: gptq (dense models) or bits" in refused
    (refused,) = problems(model("qwen3_omni_moe", q_proj=(128, 128)), scheme=INT4)
    assert "has no forward of its own" in refused


def test_a_row_may_be_of_the_multimodal_model_alone() -> None:
    text = model("dots3_note", q_proj=(128, 128))
    assert problems(text, scheme=INT4) == []
    whole = replace(text, config={**text.config, "architectures": ["Dots3NoteForConditionalGeneration"]})
    assert "fails to join" in problems(whole, scheme=INT4)[0]


def test_what_is_tiny_stays_as_it_is() -> None:
    shapes = {"altup.correction_coefs": (4, 4), "altup.prediction_coefs": (16, 4)}
    assert problems(model(q_proj=(128, 128), **shapes), scheme=INT4) == []
    (refused,) = problems(model(q_proj=(128, 128), k_proj=(32, 4)), scheme=INT4)
    assert "doesn't divide the layer widths of 'org/model', got [4]" in refused


def test_a_package_that_a_family_needs_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.fitting.find_spec", lambda name: None)
    assert "needs the package timm, which isn't installed; pip install timm on every node" in str(
        model_problem(model("gemma3n"))
    )
    monkeypatch.undo()
    assert model_problem(model("inkling_mm_model")) is None


@pytest.mark.parametrize(
    ("definition", "shape", "said", "unsaid"),
    [
        ({"format": "gptq", "scheme": INT4}, (64, 48), "32 must divide its outputs and 32 its inputs", "group_size"),
        ({"format": "gptq", "scheme": INT4}, (64, 96), "set scheme.group_size: 32, or scheme.group_size: null", "16"),
        (
            {"format": "awq", "scheme": {**INT4, "symmetric": False}},
            (64, 96),
            "set scheme.group_size: 32",
            "null",
        ),
        (
            {"format": "gptq", "scheme": {**INT4, "symmetric": False}},
            (64, 96),
            "set scheme.group_size: 32",
            "null",
        ),
    ],
)
def test_advice_is_what_the_format_and_its_runtime_take(
    definition: dict[str, Any], shape: tuple[int, int], said: str, unsaid: str
) -> None:
    (refused,) = problems(model(q_proj=shape), **definition)
    assert said in refused
    assert unsaid not in refused.partition("; ")[2]
