"""Artifacts in vLLM itself, in the environment ``vllm-cpu``: every recipe that it reads, and planted faults."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.planning import fitting, sources
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.errors import PreflightError
from workers.machine.environments import interpreter
from workers.quantize.one_pass import quantize
from workers.spec.engines import ENGINES
from workers.spec.job import CHECKED, LOADER_CHECKED, Job, ReasonCode, Verdict
from workers.spec.recipes import Recipe
from workers.spec.runtimes import VLLM, RuntimeRequest
from workers.verify.foreign import CheckRequest, check
from workers.verify.runtimes import vllm_rounding
from workers.verify.runtimes.ask import ask
from workers.verify.stage import verify

CACHED = shipped.recipe("rtn-w4-g128").model_copy(update={"kv_cache": "fp8", "name": "cached"})
ASYMMETRIC = [
    jobs.recipe(name=f"asymmetric-{bits}", method="rtn", scheme={"bits": bits, "group_size": 128, "symmetric": False})
    for bits in (4, 8)
]
IN_MIXTURES = ("gptq-w4-g128", "fp8-block", "mxfp4-w4a4")


def environment() -> Path | None:
    try:
        return interpreter(VLLM.environment or "")
    except PreflightError:
        return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(environment() is None, reason="`quantmill env create vllm-cpu` wasn't run here"),
]
# An AVX2 machine has kernels for these alone.
NATIVE = {"fp8-dynamic", "w8a8-int8", "bnb-nf4", "bnb-int8"}
# Inputs of four bits: a last bit that differs may flip a code (configs/gates.yaml).
FOUR_BIT_INPUTS = jobs.LOOSE.model_copy(update={"runtime_logit_difference": 0.3})


def of(model: str) -> list[str]:
    """The shipped recipes that the plan makes of a model for vLLM."""
    source = sources.resolve(ModelEntry(id=model), jobs.ZOO / "models")
    shipped_ones = map(shipped.recipe, shipped.recipe_names())
    # What another library makes is in the same formats, and takes its environment.
    ours = [recipe for recipe in shipped_ones if recipe.method != "keep" and ENGINES[recipe.engine].script is None]
    chosen = [recipe for recipe in ours if recipe.format in VLLM.rules]
    fitting_both = [r for r in chosen if not list(fitting.recipe_problems(source, r, ("transformers", VLLM.name)))]
    return [recipe.name for recipe in fitting_both]


def made_of(model: str, workspace: Path, recipes: list[Recipe]) -> Job:
    job = jobs.job(jobs.ZOO / "models" / model, workspace, *map(jobs.quick, recipes), samples=4)
    orders = tuple(order.model_copy(update={"runtimes": (VLLM.name,)}) for order in job.orders)
    job = job.model_copy(update={"orders": orders})
    made, _ = quantize(job, jobs.ZOO / "models" / model)
    assert [artifact.error for artifact in made if artifact.error] == []
    loose = (
        order.model_copy(update={"thresholds": FOUR_BIT_INPUTS})
        if order.recipe.scheme.family.endswith("w4a4")
        else order
        for order in job.orders
    )
    return job.model_copy(update={"orders": tuple(loose)})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Job:
    recipes = [*map(shipped.recipe, of("llama-tiny")), CACHED, *ASYMMETRIC]
    return made_of("llama-tiny", tmp_path_factory.mktemp("dense"), recipes)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Job:
    recipes = [*map(shipped.recipe, IN_MIXTURES), ASYMMETRIC[0]]
    return made_of("qwen3-moe-tiny", tmp_path_factory.mktemp("mixture"), recipes)


def in_vllm(job: Job, recipe: str) -> Verdict:
    order = job.order(recipe).model_copy(update={"runtimes": (VLLM.name,)})
    return verify(job, order, Path(job.model.folder or "")).verdict


@pytest.mark.parametrize("recipe", [*of("llama-tiny"), CACHED.name, *(recipe.name for recipe in ASYMMETRIC)])
def test_each_recipe_that_vllm_reads_is_loaded_by_it(recipe: str, dense: Job) -> None:
    verdict = in_vllm(dense, recipe)
    assert verdict.accepted, verdict.reasons
    assert verdict.runtime is not None
    assert verdict.runtime.version.startswith("0.32")
    assert verdict.runtime.kl_mean is not None
    assert verdict.runtime.kl_mean < (0.03 if recipe.endswith("w4a4") else 0.01)
    assert 1 <= len(verdict.generations) <= 4, "those that name people are left out"
    if "AVX2" in verdict.runtime.processor:
        assert verdict.runtime.verdict == (CHECKED if recipe in NATIVE else LOADER_CHECKED)
        assert bool(verdict.runtime.kernels) is (recipe not in NATIVE)


@pytest.mark.parametrize("recipe", [*IN_MIXTURES, ASYMMETRIC[0].name])
def test_a_mixtures_experts_are_loaded_by_it(recipe: str, mixture: Job) -> None:
    verdict = in_vllm(mixture, recipe)
    assert verdict.accepted, verdict.reasons
    assert verdict.runtime is not None
    # transformers doesn't round the inputs of experts, which it fuses, and our decoding neither.
    assert verdict.runtime.relative_logit_difference < (0.2 if recipe.endswith("w4a4") else 0.05)


@pytest.mark.parametrize("recipe", ["fp8-static", "w8a8-int8", "nvfp4"])
def test_experts_that_transformers_cannot_load_are_made_for_vllm_alone(recipe: str, tmp_path: Path) -> None:
    model = jobs.ZOO / "models" / "qwen3-moe-tiny"
    job = jobs.job(model, tmp_path, jobs.quick(shipped.recipe(recipe)), samples=4)
    for runtimes, refused in (((), True), (("transformers", VLLM.name), True), ((VLLM.name,), False)):
        orders = (job.orders[0].model_copy(update={"runtimes": runtimes}),)
        (artifact,), _ = quantize(job.model_copy(update={"orders": orders}), model)
        assert (artifact.error is not None) is refused, runtimes
    verdict = in_vllm(job, recipe)
    assert verdict.accepted, verdict.reasons


def in_process(checkpoint: Path, workspace: Path) -> tuple[str, ...]:
    """The problems that vLLM's process names, whatever our own decoder says."""
    tokens = torch.arange(32).reshape(1, 32)
    request = RuntimeRequest(artifact=str(checkpoint), scratch=str(workspace))
    return ask(VLLM, request, tokens, tokens.clone()).problems


Edit = Callable[[dict[str, Any]], None]


def folder_of(job: Job, recipe: str) -> Path:
    return next(path for path in Path(job.workspace, "artifacts").glob(f"{recipe}-????????????????") if path.is_dir())


def planted(job: Job, recipe: str, to: Path) -> Path:
    """A copy of an artifact, as a checkpoint of nobody's."""
    shutil.copytree(folder_of(job, recipe), to)
    (to / "quantmill.json").unlink(missing_ok=True)
    return to


def declare(folder: Path, edit: Edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def reasons(job: Job, checkpoint: Path, workspace: Path) -> str:
    """What ``quantmill verify CHECKPOINT --runtime vllm`` says of it."""
    request = CheckRequest(
        checkpoint=str(checkpoint), reference=job.model, verification=job.verification, thresholds=jobs.LOOSE,
        workspace=str(workspace), runtimes=(VLLM.name,),
    )  # fmt: skip
    verdict = check(request).verdict
    assert verdict is not None
    assert not verdict.accepted
    assert {ReasonCode.RUNTIME, ReasonCode.RUNTIME_LOGITS} & set(verdict.codes)
    return "\n".join(verdict.reasons)


@pytest.mark.parametrize(
    ("recipe", "key", "said"),
    [
        ("gptq-w4-g128", "ignore", "no module or parameter named 'layers.0.mlp.gate.weight'"),
        (
            "fp8-block",
            "modules_to_not_convert",
            "no tensor of the checkpoint sets model.layers.0.mlp.gate.weight_scale",
        ),
    ],
)
def test_a_mixture_without_its_routers_declared_is_named(
    recipe: str, key: str, said: str, mixture: Job, tmp_path: Path
) -> None:
    folder = planted(mixture, recipe, tmp_path / "planted")
    declare(folder, lambda config: config.update({key: [n for n in config[key] if not n.endswith("mlp.gate")]}))
    assert said in reasons(mixture, folder, tmp_path)


def test_global_scales_that_differ_within_qkv_are_named(dense: Job, tmp_path: Path) -> None:
    folder = planted(dense, "nvfp4", tmp_path / "planted")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj."
    tensors[f"{key}weight_global_scale"] /= 2
    tensors[f"{key}weight_scale"] = (tensors[f"{key}weight_scale"].float() / 2).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = reasons(dense, folder, tmp_path)
    assert "model.layers.0.self_attn.qkv_proj.weight_global_scale: the parts of this fused layer have several" in said


def test_scales_of_keys_that_are_not_there_are_named(dense: Job, tmp_path: Path) -> None:
    folder = planted(dense, CACHED.name, tmp_path / "planted")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (problem,) = in_process(folder, tmp_path)
    assert "no tensor of the checkpoint sets model.layers.1.self_attn.attn.k_scale" in problem


@pytest.mark.parametrize(("name", "function", "more"), [
    ("nvfp4", "nvfp4_emulation_utils:ref_nvfp4_quant_dequant", (torch.tensor(700.0), 16)),
    ("mxfp8", "mxfp8_utils:_mxfp8_e4m3_quantize_torch", ()),
])  # fmt: skip
def test_inputs_are_rounded_as_its_own_code_does(
    name: str, function: str, more: tuple[Any, ...], tmp_path: Path
) -> None:
    module, _, called = function.partition(":")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    torch.save((x, more), tmp_path / "given.pt")
    script = f"""
import torch
from vllm.model_executor.layers.quantization.utils.{module} import {called}
x, more = torch.load("given.pt")
found = {called}(x, *more)
if isinstance(found, tuple):
    values, exponents = found
    found = (values.float().unflatten(-1, (-1, 32)) * torch.exp2(exponents.float() - 127).unsqueeze(-1)).flatten(-2)
torch.save(found, "found.pt")
"""
    python = environment()
    assert python is not None
    subprocess.run([python, "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    ours = getattr(vllm_rounding, name)(x, *more[:1])
    differ = ~torch.isclose(torch.load(tmp_path / "found.pt"), ours, rtol=1e-5)
    assert differ.float().mean() < 1e-3, "alone where a last bit decides"


def test_several_schemes_within_qkv_are_named(tmp_path: Path) -> None:
    own = shipped.recipe("gptq-w4-g128").model_dump(mode="json")
    own |= {"name": "parted", "overrides": [{"modules": ["*.v_proj"], "scheme": {"bits": 8, "group_size": 128}}]}
    job = made_of("llama-tiny", tmp_path / "made", [jobs.recipe(**own)])
    said = reasons(job, planted(job, "parted", tmp_path / "planted"), tmp_path)
    assert "vLLM fuses model.layers.0.self_attn.k_proj" in said
    assert "whose parts must be stored alike" in said
