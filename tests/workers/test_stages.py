"""Quantize and verify on the small models, without Ray: one pass for all recipes, and nothing broken gets through."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.zoo import shipped
from tests.workers.faults import PLANTED, tensors
from tests.workers.jobs import LOOSE, ZOO, job, recipe
from workers.machine.files import file_sha256
from workers.run import run_stage
from workers.spec.job import Job, Manifest, Stage, StageResult, Thresholds
from workers.spec.workspace import artifact_folder

LLAMA = ZOO / "models" / "llama-tiny"
MOE = ZOO / "models" / "qwen3-moe-tiny"
GPT2 = ZOO / "models" / "gpt2-tiny"

pytestmark = pytest.mark.usefixtures("forked")


def quantize(of: Job) -> StageResult:
    return run_stage(of, Stage.QUANTIZE)


def verify(of: Job, name: str) -> Manifest:
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    return result.manifest


def weights_sha256(of: Job, name: str) -> str:
    return file_sha256(artifact_folder(of.workspace, of.order(name)) / "model.safetensors")


@pytest.mark.slow
def test_a_recipe_makes_the_same_bytes_alone_and_with_seven_others(tmp_path: Path) -> None:
    rtn3 = recipe(name="rtn-w3", method="rtn", scheme={"bits": 3, "group_size": 64}, format="gptq")
    own = recipe(name="own", method="gptq", scheme={"bits": 4, "group_size": 64}, options={"propagate": "quantized"})
    names = ["gptq-w4-g128", "awq-w4-g128", "w8a8-int8", "fp8-static"]
    company = job(LLAMA, tmp_path / "a", "bnb-nf4", rtn3, "gptq-w8-g128", own, *names)
    made = quantize(company)
    assert made.failure is None, made.failure
    assert [artifact.error for artifact in made.artifacts] == [None] * 8
    for name in names:
        alone = job(LLAMA, tmp_path / name, name)
        quantize(alone)
        assert weights_sha256(alone, name) == weights_sha256(company, name), name
    assert not list((tmp_path / "a" / "artifacts").glob(".*")), "something half-written is left"


def test_what_was_made_is_not_made_again(tmp_path: Path) -> None:
    one = job(LLAMA, tmp_path, "bnb-nf4")
    first = quantize(one)
    before = artifact_folder(one.workspace, one.orders[0]).stat().st_mtime_ns
    both = job(LLAMA, tmp_path, "bnb-nf4", "rtn-w4-g128")
    second = quantize(both)
    assert second.artifacts[0] == first.artifacts[0]
    assert artifact_folder(one.workspace, one.orders[0]).stat().st_mtime_ns == before
    assert second.artifacts[1].error is None


def test_a_recipe_that_the_model_cannot_take_fails_alone(tmp_path: Path) -> None:
    made = quantize(job(GPT2, tmp_path, "gptq-w4-g128", "bnb-nf4")).artifacts
    assert made[0].error is not None
    assert made[0].error.kind == "UnsupportedRecipe"
    assert "Conv1D" in made[0].error.message
    assert "bitsandbytes" in made[0].error.message
    assert made[1].error is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LLAMA, "gptq-w8-g128"),
        (LLAMA, "gptq-mixed-4-8"),
        (LLAMA, "awq-w4-g128-gemm"),
        (LLAMA, "w8a8-int8"),
        (LLAMA, "fp8-static"),
        (LLAMA, "fp8-block"),
        (LLAMA, "hqq-w4-g64"),
        (LLAMA, "nvfp4"),
        (LLAMA, "bnb-fp4"),
        (MOE, "gptq-w4-g128"),
        (MOE, "awq-w4-g128"),
        (MOE, "fp8-dynamic"),
        (LLAMA, "nvfp4-w4a4"),
        (LLAMA, "mxfp4-w4a4"),
        (MOE, "mxfp4"),
        (LLAMA, "mxfp8"),
        (GPT2, "bnb-int8"),
        (GPT2, "bnb-nf4"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_shipped_recipes_are_accepted(model: Path, name: str, tmp_path: Path) -> None:
    shipped_gate = shipped.gates()["default"][shipped.recipe(name).scheme.family]
    noise = {"runtime_logit_difference": shipped_gate.runtime_logit_difference}
    of = job(model, tmp_path, name, thresholds=LOOSE.model_copy(update=noise))
    assert quantize(of).artifacts[0].error is None
    manifest = verify(of, name)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.verdict.runtime is not None
    assert manifest.verdict.runtime.name == "transformers"
    assert len(manifest.verdict.worst_layers) == 3
    assert manifest.verdict.layer_noise[int(manifest.verdict.worst_layers[0][0].split(".")[2])] is not None
    with_experts = model.name == "qwen3-moe-tiny" and manifest.recipe.calibrated
    assert [each.experts for each in manifest.expert_tokens] == [8] * (3 if with_experts else 0)
    assert all(0 <= each.least <= each.median <= each.most for each in manifest.expert_tokens)
    assert manifest.bytes < manifest.reference_bytes


@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [
        (4, True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, True), (3, False), (4, False), (8, False))),
    ],
)
def test_the_gptq_format_in_all_widths(bits: int, symmetric: bool, tmp_path: Path) -> None:
    scheme = {"bits": bits, "group_size": 64, "symmetric": symmetric}
    of = job(LLAMA, tmp_path, recipe(name="mine", method="gptq", scheme=scheme, format="gptq"))
    made = quantize(of).artifacts[0]
    assert made.error is None, made.error
    manifest = verify(of, "mine")
    assert manifest.verdict.accepted, manifest.verdict.reasons


def test_widths_that_no_group_divides_are_a_choice(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_pretrained(LLAMA)
    config.intermediate_size, config.num_hidden_layers = 172, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "odd")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, tmp_path / "odd" / name)

    def mine(choice: str) -> Job:
        scheme = {"bits": 4, "group_size": 128, "indivisible": choice}
        return job(tmp_path / "odd", tmp_path, recipe(name=choice, method="rtn", scheme=scheme))

    refused = quantize(mine("refuse")).artifacts[0]
    assert refused.error is not None
    assert "doesn't divide the width 172" in refused.error.message
    for choice, said in (("channel", "one scale for each output"), ("keep", "left in half precision")):
        of = mine(choice)
        made = quantize(of).artifacts[0]
        assert made.error is None, made.error
        assert [note for note in made.fallbacks if said in note and "down_proj" in note]
        manifest = verify(of, choice)
        assert manifest.verdict.accepted, manifest.verdict.reasons
        assert manifest.fallbacks == made.fallbacks


def test_an_artifact_below_its_gates_is_rejected_kept_and_judged_again(tmp_path: Path) -> None:
    rough = recipe(name="rough", method="rtn", scheme={"bits": 2, "group_size": 128}, format="gptq")
    strict = Thresholds(kl_mean=1e-6, top1_agreement=0.99999, perplexity_ratio=1.000001, runtime_logit_difference=0.1)
    of = job(LLAMA, tmp_path, rough, thresholds=strict)
    quantize(of)
    rejected = verify(of, "rough")
    assert not rejected.verdict.accepted
    said = " ".join(rejected.verdict.reasons)
    assert all(
        words in said for words in ("KL divergence", "top-1 agreement", "perplexity ratio", "expected at most 1e-06")
    )
    assert artifact_folder(of.workspace, of.orders[0]).is_dir()
    lenient = of.model_copy(update={"orders": (of.orders[0].model_copy(update={"thresholds": LOOSE}),)})
    accepted = verify(lenient, "rough")
    assert accepted.verdict.accepted
    assert accepted.verdict.metrics == rejected.verdict.metrics


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Job:
    of = job(LLAMA, tmp_path_factory.mktemp("good"), "rtn-w4-g128", thresholds=Thresholds(
        kl_mean=0.2, top1_agreement=0.8, perplexity_ratio=1.2, runtime_logit_difference=0.05,
    ))  # fmt: skip
    assert quantize(of).artifacts[0].error is None
    return of


def test_an_artifact_that_changed_after_its_verdict_is_verified_anew(good: Job, tmp_path: Path) -> None:
    shutil.copytree(good.workspace, tmp_path, dirs_exist_ok=True)
    of = good.model_copy(update={"workspace": str(tmp_path)})
    assert verify(of, "rtn-w4-g128").verdict.accepted
    PLANTED["codes of other rows"].plant(artifact_folder(tmp_path, of.orders[0]))
    assert not verify(of, "rtn-w4-g128").verdict.accepted


def test_broken_weights_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    tensors(lambda loaded: loaded["model.layers.1.mlp.up_proj.weight"][2, 3].fill_(float("inf")))(folder)
    made = quantize(job(folder, tmp_path, "rtn-w4-g128", "bnb-nf4"))
    errors = [artifact.error for artifact in made.artifacts]
    assert [error.kind for error in errors if error] == ["NumericalError", "NumericalError"]
    assert all("layers.1.mlp.up_proj.weight" in error.message for error in errors if error)
    calibrated = quantize(job(folder, tmp_path, "gptq-w4-g128"))
    assert calibrated.failure is not None
    assert calibrated.failure.kind == "NumericalError"


def test_more_samples_than_the_text_holds(tmp_path: Path) -> None:
    failure = quantize(job(LLAMA, tmp_path, "gptq-w4-g128", samples=100_000)).failure
    assert failure is not None
    assert failure.kind == "CalibrationError"
    assert "got 100000, but the data set holds" in failure.message
    assert "set samples to at most" in failure.message


def test_pickles_are_read_where_the_zoo_allows_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused = quantize(job(folder, tmp_path / "a", "rtn-w4-g128")).failure
    assert refused is not None
    assert "allow_pickle: true" in refused.message
    allowed = job(folder, tmp_path / "b", "rtn-w4-g128", allow_pickle=True)
    assert quantize(allowed).artifacts[0].error is None
    plain = job(LLAMA, tmp_path / "c", "rtn-w4-g128")
    quantize(plain)
    assert weights_sha256(allowed, "rtn-w4-g128") == weights_sha256(plain, "rtn-w4-g128")


def test_a_model_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    of = job(folder, tmp_path, "rtn-w4-g128")
    assert run_stage(of, Stage.FETCH).failure is None
    (folder / "generation_config.json").write_text("{}")
    failure = run_stage(of, Stage.FETCH).failure
    assert failure is not None
    assert "changed since it was planned" in failure.message
