"""The zoo file: what it may say, and what a mistake in it is answered with."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.zoo import shipped, zoo
from workers.errors import ZooError
from workers.spec.recipes import GptqRecipe
from workers.spec.schemes import IntScheme

GOOD = """
name: small
models: [{id: org/name}]
recipes: [gptq-w4-g128, bnb-nf4]
calibration: {dataset: {path: text, data_files: [a.txt]}}
verify: {dataset: {path: text, data_files: [b.txt]}}
"""
CALIBRATION = "{dataset: {path: text, data_files: [a.txt]}}"


def load(tmp_path: Path, text: str) -> zoo.Zoo:
    path = tmp_path / "zoo.yaml"
    path.write_text(text)
    return zoo.load(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ZooError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_names_are_looked_up_and_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    made = load(tmp_path, GOOD)
    gptq = made.resolved_recipes[0]
    assert isinstance(gptq, GptqRecipe)
    assert gptq.scheme == IntScheme(bits=4, group_size=128, symmetric=True)
    assert made.calibration is not None
    assert (made.calibration.samples, made.calibration.sequence_length, made.calibration.seed) == (512, 2048, 0)
    assert made.verify.tokens == 16384
    assert made.models[0].revision == "main"
    assert not made.models[0].trust_remote_code
    assert not made.models[0].allow_pickle


def test_a_recipe_can_be_defined_in_place(tmp_path: Path) -> None:
    definition = "{name: mine, method: rtn, scheme: {bits: 3, group_size: 64}, format: gptq}"
    made = load(tmp_path, GOOD.replace("bnb-nf4]", definition + "]"))
    assert made.resolved_recipes[1].name == "mine"
    assert made.resolved_recipes[1].scheme.family == "w3"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{id: org/name}", "{id: org/name, revsion: x}"), ["models.0.revsion", "unknown key", "'revision'"]),
        (("gptq-w4-g128", "gptq-w4-g12"), ["unknown recipe, got 'gptq-w4-g12'", "'gptq-w4-g128'", "bnb-fp4"]),
        (("{id: org/name}", "{id: org/name}, {id: org/name}"), ["model 'org/name' is listed twice"]),
        (("bnb-nf4]", "gptq-w4-g128]"), ["recipe 'gptq-w4-g128' is listed twice"]),
        (("b.txt", "a.txt"), ["verify.dataset is the calibration data"]),
        (("[a.txt]}}", "[a.txt]}, samples: 0}"), ["calibration.samples", "got 0"]),
        (("name: small", "version: 2\nname: small"), ["version: got 2", "reads version 1 of zoo files; upgrade"]),
        (
            (CALIBRATION, "genral"),
            ["did you mean 'general'", "quantmill ships chat, "],
        ),
        (("{dataset: {path: text", "{set: chat, dataset: {path: text"), ["set and dataset are given"]),
        (
            (CALIBRATION, "{samples: 3}"),
            ["expected one of dataset, mixture and set"],
        ),
        (("verify:", "verify: {gates: strict,\n  dataset: {path: text}}\nx:"), ["unknown key, got 'x'"]),
        (("[b.txt]}}", "[b.txt]}, gates: strict}"), ["verify.gates", "unknown set of gates", "got 'strict'"]),
        (("[b.txt]}}", "[b.txt]}, gates: {w5: {kl_mean: 1}}}"), ["verify.gates: 'w5' is neither a recipe", "nf4, w4"]),
        (("{id: org/name}", "{id: org/name, gates: {mine: {}}}"), ["gates of 'org/name': 'mine' is neither"]),
        (("[b.txt]}}", "[b.txt]}, gates: {w4: {kl_mean: -1}}}"), ["kl_mean", "got -1"]),
        (("name: small", "name: small\nname: again"), ["key 'name' is given twice"]),
        (("name: small", "name: Not a Slug"), ["name", "got 'Not a Slug'"]),
        (("verify:", "publish: {namespace: a, name: x}\nverify:"), ["publish.name", "{model}"]),
        (("verify:", 'publish: {namespace: a, name: "{model}"}\nverify:'), ["publish.name", "'compressed-tensors'"]),
        (
            ("verify:", 'publish: {namespace: a, name: "{model}-GGUF", endpoint: /srv/models}\nverify:'),
            ["publish", "must contain {recipe}", "in a folder"],
        ),
        (("name: small", "name: small\nstorage: runs/shared"), ["storage", "got 'runs/shared'", "absolute path"]),
        (("name: small", "name: small\nstorage: https://x.y/z"), ["storage", "got 'https://x.y/z'", "s3://"]),
        (("name: small", "name: small\nstorage: s3://key:word@x/y"), ["storage", "holds credentials"]),
    ],
)
def test_a_mistake_is_named_with_its_value(tmp_path: Path, change: tuple[str, str], said: list[str]) -> None:
    message = refusal(tmp_path, GOOD.replace(*change))
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("definition", "path"),
    [
        ("{method: awq, scheme: {bits: 4}, format: compressed-tensors, options: {gird: 20}}", "recipes.0.options.gird"),
        ("{method: rtn, scheme: {type: mxfp4, scale: 3}, format: compressed-tensors}", "recipes.0.scheme.scale"),
        ("{method: rtn, scheme: {type: fp8, scales: row}, format: compressed-tensors}", "recipes.0.scheme.scales"),
        ("{method: gptq, scheme: {bits: 9}, format: gptq}", "recipes.0.scheme.bits"),
        ("{method: gptq, format: gptq}", "recipes.0.scheme"),
        ("{method: bitsandbytes, scheme: {type: nf4, double: true}}", "recipes.0.scheme.double"),
        ("{method: gptq, scheme: {bits: 4, group_size: 48}, format: gptq}", "recipes.0"),
        ("{method: gptq, scheme: {bits: 4}, format: gtpq}", "recipes.0.format"),
    ],
)
def test_a_path_is_one_of_the_file(tmp_path: Path, definition: str, path: str) -> None:
    message = refusal(tmp_path, GOOD.replace("[gptq-w4-g128, bnb-nf4]", f"[{{name: mine, {definition[1:]}]"))
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [path], message


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("org/name}", "org/name, revsion: x}").replace("[a.txt]}}", "[a.txt]}, samples: 0}")
    assert "2 problems" in refusal(tmp_path, text)


def test_a_pair_that_no_runtime_reads_is_refused_with_those_that_can(tmp_path: Path) -> None:
    definition = "{name: x, method: gptq, scheme: {bits: 3, symmetric: false}, format: compressed-tensors}"
    message = refusal(tmp_path, GOOD.replace("bnb-nf4", definition))
    assert "choose format: gptq" in message
    message = refusal(
        tmp_path, GOOD.replace("bnb-nf4", "{name: x, method: rtn, scheme: {bits: 4}, format: bitsandbytes}")
    )
    assert "choose format: compressed-tensors or gptq" in message


@pytest.mark.parametrize("text", ["", "[1, 2]", "name: [", "\x00"])
def test_what_is_no_zoo_is_refused(tmp_path: Path, text: str) -> None:
    assert "zoo.yaml" in refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no such file, got '.*nowhere.yaml'"):
        zoo.load(tmp_path / "nowhere.yaml")


def test_gates_go_from_the_family_to_the_recipe_and_from_the_zoo_to_the_model(tmp_path: Path) -> None:
    text = GOOD.replace(
        "[b.txt]}}", "[b.txt]}, gates: {w4: {kl_mean: 0.1, top1_agreement: 0.7}, bnb-nf4: {kl_mean: 0.3}}}"
    )
    text = text.replace("{id: org/name}", "{id: org/name}, {id: org/other, gates: {w4: {kl_mean: 0.05}}}")
    made = load(tmp_path, text)
    (gptq, nf4), (name, other) = made.resolved_recipes, made.models
    shipped_w4 = shipped.gates()["default"]["w4"]
    assert made.thresholds(name, gptq) == shipped_w4.model_copy(update={"kl_mean": 0.1, "top1_agreement": 0.7})
    assert made.thresholds(other, gptq) == shipped_w4.model_copy(update={"kl_mean": 0.05, "top1_agreement": 0.7})
    assert made.thresholds(name, nf4) == made.thresholds(other, nf4)
    assert made.thresholds(name, nf4).kl_mean == 0.3


def test_every_shipped_recipe_is_valid_and_has_gates() -> None:
    assert {"bnb-nf4", "bnb-fp4", "bnb-int8", "gptq-w4-g128", "gptq-w8-g128", "rtn-w4-g128"} <= set(
        shipped.recipe_names()
    )
    for name in shipped.recipe_names():
        recipe = shipped.recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert recipe.scheme.family in shipped.gates()["default"]


CONFIGS = sorted([*shipped.configs().glob("*.yaml"), *shipped.configs().glob("examples/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.name == "gates.yaml":
        assert shipped.gates()["default"]
    else:
        assert zoo.load(path).models


def test_the_schema_accepts_what_the_loader_accepts() -> None:
    schema = zoo.Zoo.model_json_schema()
    assert set(schema["required"]) == {"name", "models", "recipes", "verify"}
    assert schema["additionalProperties"] is False
    assert "properties" in json.loads(json.dumps(schema))


def test_a_zoo_without_calibration_takes_the_default_set(tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text(GOOD.replace(f"calibration: {CALIBRATION}\n", ""))
    made = zoo.load(path).calibration
    assert made is not None
    assert made.set == shipped.DEFAULT_SET
    assert made.mixture == shipped.calibration_set(shipped.DEFAULT_SET).mixture
    path.write_text(path.read_text().replace("gptq-w4-g128, ", ""))
    assert zoo.load(path).calibration is None


@pytest.mark.parametrize("name", shipped.calibration_sets())
def test_each_set_is_named_with_what_differs_and_comes_back_from_a_parcel(name: str, tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text(GOOD.replace(CALIBRATION, f"{{set: {name}, samples: 64}}"))
    loaded = zoo.load(path)
    assert loaded.calibration is not None
    assert (loaded.calibration.set, loaded.calibration.samples) == (name, 64)
    assert sum(loaded.calibration.counts) == 64
    # A submitted run reads it as it was written out.
    path.write_text(yaml.safe_dump(loaded.model_dump(mode="json", exclude_unset=True)))
    assert zoo.load(path) == loaded
