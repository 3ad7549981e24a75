"""The rows name the same things in every room, and every place reads them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from pipeline.planning import sizing, sources
from pipeline.zoo import shipped, tables
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.checkpoint.containers import SOURCES, WRITERS
from workers.engines.table import MAKERS
from workers.formats.table import CODECS
from workers.machine import environments, preflight
from workers.methods.table import METHODS
from workers.numerics import fp8
from workers.quantize.one_pass import quantize
from workers.spec.data import Calibration, Dataset
from workers.spec.engines import ENGINES, Engine
from workers.spec.formats import FORMATS, HF_QUANTIZER, recognised
from workers.spec.job import ModelPin, fingerprint
from workers.spec.layers import LayerKinds, kinds_of
from workers.spec.libraries import LIBRARIES
from workers.spec.recipes import KeepRecipe, Recipe
from workers.spec.runtimes import RUNTIMES, VLLM, checking, misfit
from workers.spec.schemes import FP8_BLOCK
from workers.verify import source_check

ROOT = Path(__file__).parents[3]
RECIPES = shipped.recipe_names()


def recipe_classes() -> list[type]:
    by_method, *_ = get_args(get_args(Recipe)[0])
    return list(get_args(get_args(by_method)[0]))


def test_formats_have_a_codec_a_writer_and_a_runtime_that_reads_them() -> None:
    assert set(FORMATS) == set(CODECS)
    for name, row in FORMATS.items():
        assert row.name == name
        assert row.container in WRITERS
        assert row.container in SOURCES
        assert name in checking(name).rules, "no runtime checks it"
    for runtime in RUNTIMES.values():
        assert set(runtime.rules) <= set(FORMATS)
        assert set(runtime.packages) <= set(runtime.rules)
        assert runtime.entry or runtime.tried, "neither asked nor seen"


def test_methods_and_engines_are_those_of_the_recipes() -> None:
    methods = {get_args(cls.model_fields["method"].annotation)[0]: cls for cls in recipe_classes()}
    linear = {name: cls for name, cls in methods.items() if cls.engine == "linear"}
    assert {name: row.recipe for name, row in METHODS.items()} == linear
    assert {cls.engine for cls in methods.values()} | set(LIBRARIES) == set(ENGINES)
    assert {name for name, row in ENGINES.items() if row.script is None} == set(MAKERS)
    for name, row in METHODS.items():
        folding = any(recipe.needs.folds for recipe in map(shipped.recipe, RECIPES) if recipe.method == name)
        assert (row.input_scales is not None) == folding


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_held_and_read(name: str) -> None:
    recipe = shipped.recipe(name)
    assert recipe.scheme.family in shipped.gates()["default"]
    if isinstance(recipe, KeepRecipe):  # its scheme is the source's
        assert FORMATS[recipe.format].keeps
        return
    assert FORMATS[recipe.format].holds(recipe.scheme)
    assert misfit(recipe.format, recipe.scheme, LayerKinds()) is None


def test_configs_are_recognised_by_one_row_alone() -> None:
    declared = [
        {"quant_method": "compressed-tensors"}, {"quant_method": "gptq", "checkpoint_format": "gptq"},
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, {"quant_method": "awq"}, {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gguf"},
        {"group_size": 64, "bits": 4, "mode": "affine"}, {"quant_method": "torchao"},
    ]  # fmt: skip
    assert [getattr(recognised(config), "name", None) for config in declared] == list(FORMATS)
    for config in declared:
        assert sum(row.declares(config) for row in FORMATS.values()) == 1
    assert recognised({"quant_method": "quark"}) is HF_QUANTIZER
    assert recognised({}) is None


def test_constants_that_rooms_cannot_share_are_equal() -> None:
    assert fp8.BLOCK == FP8_BLOCK
    assert source_check.PROCESS_BYTES == sizing.LOADER_BYTES


def test_a_mixture_is_one_whichever_of_its_layers_are_quantized() -> None:
    """vLLM's rules are about the model: its routers are linear layers there, also where experts stay as they are."""
    source = sources.resolve(ModelEntry(id="qwen3-moe-tiny"), jobs.ZOO / "models")
    recipe = shipped.recipe("bnb-nf4").model_copy(update={"ignore": ("*.experts.*",)})
    kinds = kinds_of(recipe, source.tensors, conv1d=False)
    assert kinds == LayerKinds(experts=False, mixture=True)
    assert VLLM.reads(recipe.format, recipe.scheme, kinds) is not None


def test_an_engine_in_an_environment_needs_none_of_its_packages_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = preflight.probe(tmp_path, with_devices=False)
    recipe = shipped.recipe("rtn-w4-g128")
    monkeypatch.setitem(ENGINES, "linear", Engine("linear", packages=("libx",)))
    assert "package libx is not installed" in preflight.problems(facts, recipe)[0]
    monkeypatch.setitem(ENGINES, "linear", Engine("linear", packages=("libx",), script="x", environment="lib"))
    assert preflight.problems(facts, recipe) == []
    assert preflight.environments_of(recipe) == ["lib"]


def test_no_other_place_names_a_format() -> None:
    """Literals equal to a format's name, some of which are also the name of a method, a scheme or a package."""
    # Beside its row and its codec.
    allowed: dict[str, set[str]] = {
        "gptq": {
            "workers/spec/recipes.py",
            "workers/methods/table.py",
            "workers/spec/libraries.py",
            "workers/engines/libraries/with_llmcompressor.py",
            "workers/engines/libraries/speak.py",
        },
        "awq": {"workers/spec/recipes.py", "workers/methods/table.py", "workers/spec/libraries.py"},
        # Scripts import nothing of quantmill.
        "compressed-tensors": {"workers/engines/libraries/with_modelopt.py"},
        # Also a family of gates.
        "fp8": {
            "workers/spec/schemes.py",
            "pipeline/planning/recommend.py",
            "workers/engines/libraries/with_llmcompressor.py",
            "workers/engines/libraries/with_modelopt.py",
        },
        "gguf": {"workers/spec/runtimes.py", "workers/spec/checkpoint_files.py"},
        "bitsandbytes": {
            "workers/spec/recipes.py",
            "workers/spec/engines.py",
            "workers/machine/warm.py",
            "workers/machine/preflight.py",
        },
        # Also an environment, and the library that files of tensors name.
        "mlx": {"workers/spec/runtimes.py", "workers/checkpoint/shards.py", "workers/spec/checkpoint_files.py"},
    }
    for path in [*ROOT.glob("workers/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        place = str(path.relative_to(ROOT))
        literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        own = {name for name in FORMATS if place == f"workers/formats/{name}.py" or place == "workers/spec/formats.py"}
        named = {name for name in FORMATS if name in literals and place not in allowed.get(name, ())} - own
        assert not named, f"{place} names {named}"


def test_the_readme_has_the_tables_of_the_rows() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.rewritten(text) == text, "print them anew: make tables"
    for name in tables.TABLES:
        assert re.search(rf"<!-- {name} -->\n\|", text)


def test_fingerprints_are_those_of_the_commit_before_the_rows() -> None:
    before: dict[str, str] = json.loads((Path(__file__).parent / "fingerprints.json").read_text())
    pin = ModelPin(id="org/name", revision="0" * 40)
    calibration = Calibration(
        dataset=Dataset(path="text", data_files=("calibration.txt",)), samples=128, sequence_length=512
    )
    now = {name: fingerprint(pin, shipped.recipe(name), calibration, "1" * 64) for name in before}
    assert now == before


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "qwen3-moe-tiny"])
def test_planned_sizes_are_those_that_are_made(model: str, tmp_path: Path) -> None:
    folder = jobs.ZOO / "models" / model
    quick = []
    for recipe in map(shipped.recipe, RECIPES):
        if environments.interpreters(preflight.environments_of(recipe))[1]:
            continue  # its environment isn't built here; tests/workers/formats/test_gguf.py compares such sizes
        if ENGINES[recipe.engine].script:
            continue  # a process of many seconds for each: tests/workers/verify/test_undecoded.py
        quick.append(jobs.quick(recipe))
    job = jobs.job(folder, tmp_path, *quick, samples=1)
    made, _ = quantize(job, folder)
    source = sources.resolve(ModelEntry(id=model), folder.parent)
    measured = 0
    for recipe, artifact in zip(quick, made, strict=True):
        if artifact.error is None:
            planned = sizing.estimate(source, recipe, job.calibration, job.verification).artifact_bytes
            assert planned == pytest.approx(artifact.bytes, rel=0.02), recipe.name
            measured += 1
        else:
            assert artifact.error.kind == "UnsupportedRecipe"
    assert measured >= 3
