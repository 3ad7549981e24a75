"""Libraries as engines: what their rows refuse, the files that their scripts leave, and artifacts beside ours."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline import env_builder
from pipeline.planning import fitting, sources
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry, check
from tests.workers import jobs
from workers.engines.libraries import speak
from workers.errors import PreflightError, ZooError
from workers.machine import environments
from workers.quantize.one_pass import quantize
from workers.spec.engines import ENGINES
from workers.spec.job import Destination, ModelPin, fingerprint
from workers.spec.libraries import LIBRARIES, REFUSED
from workers.spec.recipes import LibraryRecipe
from workers.spec.workspace import MAX_SHARD_BYTES
from workers.transfer import destinations
from workers.verify.stage import verify

ROOT = Path(__file__).parents[3]
LLAMA = jobs.ZOO / "models" / "llama-tiny"
INT4 = {"bits": 4, "group_size": 128}
GPTQMODEL: dict[str, Any] = {"name": "a", "engine": "gptqmodel", "method": "gptq", "scheme": INT4, "format": "gptq"}
OURS = [name for name in shipped.recipe_names() if isinstance(shipped.recipe(name), LibraryRecipe)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"engine": "gptq-model"}, "unknown engine, got 'gptq-model'; did you mean 'gptqmodel'?"),
        ({"engine": "hqq"}, "engine 'hqq' can't be used: .* no runtime reads"),
        ({"engine": "modelopt"}, "engine 'modelopt' has no method 'gptq'; choose method: rtn"),
        ({"engine": "autoawq"}, "engine 'autoawq' has no method 'gptq'; choose method: awq"),
        (
            {"engine": "auto-gptq", "options": {"iterations": 3}},
            "options.iterations: engine 'auto-gptq' doesn't take it",
        ),
        (
            {
                "engine": "modelopt",
                "method": "rtn",
                "format": "compressed-tensors",
                "scheme": {"type": "fp8", "scales": "channel", "activations": "dynamic"},
            },
            "doesn't make the scheme .*it makes nvfp4 weights, and fp8 with scales: tensor and activations: static",
        ),
        ({"engine": "aqlm"}, "no quantizer; name a published checkpoint to quantmill verify"),
        ({"method": "rtn"}, "engine 'gptqmodel' has no method 'rtn'; choose method: gptq"),
        ({"format": "compressed-tensors"}, "doesn't write the format 'compressed-tensors'; choose format: gptq"),
        ({"engine": "llmcompressor"}, "doesn't write the format 'gptq'; choose format: compressed-tensors"),
        ({"options": {"iterations": 3}}, "options.iterations: engine 'gptqmodel' doesn't take it .* remove it"),
        ({"scheme": {**INT4, "indivisible": "keep"}}, "doesn't make the scheme .* choose such a scheme"),
        ({"options": {"refine": 3}}, "options.refine"),
    ],
)
def test_a_row_refuses_what_its_library_does_not_make(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        jobs.recipe(**{**GPTQMODEL, **changed})
    assert re.search(words, str(caught.value).replace("\n", " ")), caught.value


def test_a_zoo_is_told_of_an_engine_by_its_path() -> None:
    zoo = {"models": ["a/b"], "recipes": [{**GPTQMODEL, "engine": "torchao"}], "verify": {"dataset": {"path": "x"}}}
    with pytest.raises(ZooError, match=r"recipes\.0\.engine: engine 'torchao' can't be used: .*method: transformers"):
        check(zoo, "zoo.yaml")


def test_an_engine_is_part_of_the_identity() -> None:
    pin, calibration = ModelPin(id="a", revision="0" * 40), jobs.job(LLAMA, Path("/x")).calibration
    bare = {key: value for key, value in GPTQMODEL.items() if key != "engine"}
    prints = {fingerprint(pin, jobs.recipe(**one), calibration, "1") for one in (GPTQMODEL, bare)}
    assert len(prints) == 2


def test_rows_have_a_script_and_an_environment_that_is_shipped() -> None:
    for name in LIBRARIES:
        row = ENGINES[name]
        assert row.script is not None
        assert (ROOT / f"{row.script.replace('.', '/')}.py").is_file()
        assert row.loads_whole_model
        assert row.environment is None or row.environment in env_builder.known()
    assert not set(LIBRARIES) & set(REFUSED)
    assert not set(REFUSED) & set(env_builder.known())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_environment_that_there_is_none_of_says_why(name: str) -> None:
    with pytest.raises(ZooError) as caught:
        env_builder.definition(name)
    assert REFUSED[name] in str(caught.value)


def test_scripts_import_nothing_of_quantmill_but_each_other() -> None:
    """They run in environments with neither pydantic nor this Python."""
    for path in (ROOT / "workers" / "engines" / "libraries").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("workers") or node.module == "workers.engines.libraries", path


@pytest.mark.parametrize("name", OURS)
def test_a_mixture_is_refused_before_anything_starts(name: str) -> None:
    for model, words in (("qwen3-moe-tiny", "mixture of experts"), ("gpt2-tiny", "Conv1D")):
        source = sources.resolve(ModelEntry(id=model), jobs.ZOO / "models")
        (problem, *_) = fitting.recipe_problems(source, shipped.recipe(name))
        assert words in problem
        assert "leave engine out" in problem
    assert not list(fitting.recipe_problems(sources.resolve(ModelEntry(id=str(LLAMA)), ROOT), shipped.recipe(name)))


NAMES = st.text("ab.1*+", min_size=1, max_size=8)


@given(NAMES, NAMES)
def test_an_expression_matches_its_name_alone(name: str, other: str) -> None:
    (pattern,) = speak.exactly([name])
    assert re.match(pattern, name)
    assert bool(re.match(pattern, other)) == (other == name)


def test_what_a_library_leaves_is_stored_as_the_source_has_it(tmp_path: Path) -> None:
    source, saved, out = (tmp_path / name for name in ("source", "saved", "out"))
    for folder in (source, saved, out):
        folder.mkdir()
    w, v, head = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    norm, bias = torch.rand(4).bfloat16(), torch.rand(4).bfloat16()
    plain = {"a.weight": w, "b.weight": v, "norm.weight": norm, "head.weight": head, "a.bias": bias}
    save_file(plain, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "x", "dtype": "bfloat16"}')
    codes = torch.zeros(2, 4, dtype=torch.int32)
    made = {"a.qweight": codes, "a.bias": bias.half(), "b.weight": v.half(), "norm.weight": (2 * norm).half()}
    save_file(made, saved / "model.safetensors")
    (saved / "config.json").write_text('{"dtype": "float16", "quantization_config": {"quant_method": "q"}}')
    recipe = {"engine": "gptqmodel", "scheme": INT4}
    request = {"source": str(source), "out": str(out), "modules": ["a", "b"], "recipe": recipe}
    speak.store(request, saved)
    stored = load_file(out / "model.safetensors")
    assert set(stored) == {"a.qweight", "a.bias", "b.weight", "norm.weight", "head.weight"}
    assert torch.equal(stored["head.weight"], head), "left out by the library"
    assert torch.equal(stored["a.bias"], bias), "the same, in another dtype"
    assert stored["a.bias"].dtype == torch.bfloat16
    assert torch.equal(stored["norm.weight"], (2 * norm).half()), "a change stays to be found by verification"
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "x", "dtype": "bfloat16", "quantization_config": {"quant_method": "q"},
    }  # fmt: skip
    answer = speak.answered(request, [])
    assert answer["layout"]["modules"] == {"a": 0}
    assert answer["fallbacks"] == ["left in half precision by gptqmodel: b"]
    assert "quantized none of 1 modules" in speak.answered({**request, "modules": ["b"]}, [])["error"]


@pytest.mark.night
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OURS)
def test_a_librarys_artifact_stands_beside_ours(name: str, tmp_path: Path) -> None:
    recipe = shipped.recipe(name)
    if (needed := ENGINES[recipe.engine].environment) is not None:
        try:
            environments.interpreter(needed)
        except PreflightError as error:
            pytest.skip(str(error))
    options = recipe.options.model_copy(update={"iterations": 20} if recipe.method == "autoround" else {})
    recipe = recipe.model_copy(update={"options": options})
    ours = {"name": "ours", "method": "rtn", "scheme": recipe.scheme.model_dump(), "format": recipe.format}
    thresholds = shipped.gates()["default"][recipe.scheme.family]
    job = jobs.job(LLAMA, tmp_path / "runs", recipe, jobs.recipe(**ours), samples=16, thresholds=thresholds)
    # Bounds by few sequences are wide, for a library's artifact as for any.
    job = job.model_copy(update={"verification": job.verification.model_copy(update={"tokens": 2048})})
    (theirs, rounded), _ = quantize(job, LLAMA)
    assert theirs.error is None, theirs.error
    assert rounded.error is None, rounded.error
    by_name = {order.recipe.name: verify(job, order, LLAMA) for order in job.orders}
    manifest = by_name[name]
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert speak.DISTRIBUTIONS.get(recipe.engine, recipe.engine) in manifest.environment
    assert manifest.fallbacks == ()
    assert theirs.bytes == pytest.approx(rounded.bytes, rel=0.02)
    metrics, other = manifest.verdict.metrics, by_name["ours"].verdict.metrics
    assert metrics is not None
    assert other is not None
    # Solvers beat rounding; another rounding on the same grid chooses its scales otherwise.
    assert metrics.kl_mean < (1.5 if recipe.method == "rtn" else 1.0) * other.kl_mean
    to = Destination(endpoint=str(tmp_path / "published"))
    revision = destinations.publish(to, "acme/theirs", Path(theirs.path))
    standing = destinations.standing(to.endpoint, "acme/theirs", job.orders[0].fingerprint)
    assert standing is not None
    assert standing[1] == revision


LIMITED: list[dict[str, Any]] = [
    {"name": "a", "engine": "gptqmodel", "method": "gptq", "format": "gptq", "scheme": {"bits": 4}},
    {"name": "a", "engine": "llmcompressor", "method": "gptq", "scheme": {"bits": 4}},
    {"name": "a", "engine": "modelopt", "method": "rtn", "scheme": {"type": "nvfp4"}},
    {"name": "a", "engine": "auto-round", "method": "autoround", "format": "gptq", "scheme": {"bits": 4}},
    {"name": "a", "engine": "autoawq", "method": "awq", "format": "awq", "scheme": {"bits": 4, "symmetric": False}},
    {"name": "a", "engine": "auto-gptq", "method": "gptq", "format": "gptq", "scheme": {"bits": 4}},
]


@pytest.mark.night
@pytest.mark.timeout(900)
@pytest.mark.parametrize("made_by", LIMITED, ids=lambda one: str(one["engine"]))
def test_what_a_recipe_leaves_is_the_sources_bit_for_bit(made_by: dict[str, Any], tmp_path: Path) -> None:
    """Layers and modules left out: nothing is folded into them, either, and transformers loads them as they are."""
    scheme = {"group_size": 128, **made_by["scheme"]} if "bits" in made_by["scheme"] else made_by["scheme"]
    options = {"iterations": 5} if made_by["method"] == "autoround" else {}
    recipe = jobs.recipe(
        **{**made_by, "scheme": scheme, "options": options}, layers="1-2", ignore=["*.v_proj", "lm_head"]
    )
    if (needed := ENGINES[recipe.engine].environment) and not environments.folder(needed).exists():
        pytest.skip(f"environment {needed!r} isn't built; run `quantmill env create {needed}`")
    job = jobs.job(LLAMA, tmp_path, recipe, samples=16)
    (made,), _ = quantize(job, LLAMA)
    assert made.error is None, made.error
    manifest = verify(job, job.orders[0], LLAMA)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    stored = {name for path in Path(made.path).glob("*.safetensors") for name in load_file(path)}
    coded = {name.rpartition(".")[0] for name in stored if name.endswith((".qweight", ".weight_packed"))}
    assert len(coded) == 2 * 6
    assert not any(name.split(".")[2] in "03" or name.endswith("v_proj") for name in coded)


def test_files_of_weights_are_as_large_as_everywhere() -> None:
    assert speak.SHARD == MAX_SHARD_BYTES
