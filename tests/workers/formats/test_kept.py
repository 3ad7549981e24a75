"""Codes of one format in another: the same weights bit for bit, or a reason; whole conversions of a small model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.cells import _for_source
from pipeline.planning.plan import make_plan
from pipeline.planning.sources import resolve
from pipeline.zoo import shipped
from pipeline.zoo import zoo as zoos
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.errors import NumericalError, UnsupportedModel, UnsupportedRecipe, UserError
from workers.formats import gptq as gptq_format
from workers.formats import kept as codes_in
from workers.formats import mlx
from workers.formats.decoded import open_decoded
from workers.formats.kept import KeptSource, open_source
from workers.formats.table import CODECS
from workers.machine.environments import interpreter
from workers.numerics import ggml
from workers.numerics.codes import IntWeight
from workers.quantize.one_pass import quantize
from workers.spec import kept
from workers.spec.formats import FORMATS
from workers.spec.job import Job, ModelPin, Order
from workers.spec.recipes import KeepRecipe
from workers.spec.schemes import GgmlScheme, IntScheme
from workers.spec.tensors import TensorHeader
from workers.verify.stage import verify

LLAMA = jobs.ZOO / "models" / "llama-tiny"
TARGETS = [name for name, row in FORMATS.items() if row.keeps]


@st.composite
def weights(draw: st.DrawFn) -> tuple[IntWeight, IntScheme]:
    """A weight of 64 x 256 whose scales float16 and bfloat16 hold alike."""
    bits, size = draw(st.sampled_from([2, 3, 4, 5, 6, 8])), draw(st.sampled_from([16, 32, 64, 128, 256, None]))
    symmetric, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes_OI = torch.randint(low, high + 1, (64, 256), generator=generator, dtype=torch.int8)
    groups = 256 // (size or 256)
    scale_OG = (torch.rand(64, groups, generator=generator) * 0.01 + 1e-3).bfloat16().to(dtype)
    zero_OG = (
        None if symmetric else torch.randint(low + 1, high + 1, (64, groups), generator=generator, dtype=torch.int8)
    )
    return IntWeight(codes_OI, scale_OG, zero_OG, bits, size), IntScheme(
        bits=bits, group_size=size, symmetric=symmetric
    )


def decoded(fmt: str, stored: dict[str, torch.Tensor], scheme: IntScheme) -> torch.Tensor:
    """The weight (float32, exact) that a format's own reader finds in the stored tensors."""
    if fmt == "mlx":
        return mlx.decode(stored, {"bits": scheme.bits, "group_size": scheme.group_size, "mode": "affine"})
    if fmt.startswith("gptq"):  # its config refuses what a runtime computes wrongly, which the plan does, too
        return (gptq_format.V2 if fmt == "gptq-v2" else gptq_format.V1).codes(stored, scheme.bits).dequantize()
    config = CODECS[fmt].config
    assert config is not None
    name = "model.layers.0.mlp.up_proj"
    decoder = CODECS[fmt].open(config({name: scheme}, []), None, False)
    assert decoder.codes is not None
    return decoder.codes(name, stored).dequantize()


@given(weights(), st.sampled_from(TARGETS))
def test_what_a_format_holds_it_holds_bit_for_bit(drawn: tuple[IntWeight, IntScheme], fmt: str) -> None:
    weight, scheme = drawn
    target = kept.stored_as(scheme, 256, fmt)
    if isinstance(target, str):
        assert target.startswith("the ")
        return
    if isinstance(target, GgmlScheme):
        raw_OR = codes_in.blocks("m", weight, target.kind)
        assert torch.equal(ggml.decode(target.kind, raw_OR), weight.dequantize())
        return
    assert FORMATS[fmt].holds(target)
    made = codes_in.converted("m", weight, target, fmt)
    encode = CODECS[fmt].encode
    assert encode is not None
    assert torch.equal(decoded(fmt, encode(made, target), target), weight.dequantize())


@pytest.mark.parametrize(
    ("scheme", "fmt", "said"),
    [
        (IntScheme(bits=4, group_size=128), "compressed-tensors", None),
        (IntScheme(bits=4, group_size=128, symmetric=False), "compressed-tensors", None),
        (IntScheme(bits=3, group_size=128, symmetric=False), "compressed-tensors", "zero points"),
        (IntScheme(bits=4, group_size=128, symmetric=False), "gguf", "zero points"),
        (IntScheme(bits=4, group_size=16), "gguf", "groups of 16"),
        (IntScheme(bits=5, group_size=128), "gptq", "codes of 5 bits"),
        (IntScheme(bits=8, group_size=128), "awq", "codes of 8 bits"),
        (IntScheme(bits=4, group_size=16), "mlx", "scales for each 16 inputs"),
        (IntScheme(bits=4, group_size=128, symmetric=False), "mlx", None),
        (IntScheme(bits=4, group_size=None), "mlx", None),
    ],
)
def test_what_would_be_lost_is_named(scheme: IntScheme, fmt: str, said: str | None) -> None:
    found = kept.stored_as(scheme, 256, fmt)
    assert (said in found) if said and isinstance(found, str) else (said is None and not isinstance(found, str))


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    scale_OG = torch.full((64, 2), 1e-9, dtype=torch.bfloat16)
    weight = IntWeight(torch.ones(64, 256, dtype=torch.int8), scale_OG, None, 4, 128)
    with pytest.raises(NumericalError, match=r"16384 of its weights would change in gptq: a scale of 9.97e-10"):
        codes_in.converted("m", weight, IntScheme(bits=4, group_size=128), "gptq")


def test_activation_order_is_refused_by_the_plan_and_by_the_reader() -> None:
    tensors = [
        TensorHeader("model.layers.0.a.qweight", (32, 64), "I32"),
        TensorHeader("model.layers.0.a.scales", (2, 64), "F16"),
        TensorHeader("model.layers.0.a.qzeros", (2, 8), "I32"),
        TensorHeader("model.layers.0.a.g_idx", (256,), "I32"),
    ]
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    assert "desc_act" in str(kept.read(config, tensors))
    assert not isinstance(kept.read({**config, "desc_act": False}, tensors), str)
    weight = IntWeight(torch.zeros(64, 256, dtype=torch.int8), torch.ones(64, 2), None, 4, 128)
    stored = gptq_format.V1.encode(weight, IntScheme(group_size=128, bits=4))
    stored["g_idx"] = stored["g_idx"].flip(0)
    decoder = CODECS["gptq"].open(config, None, False)
    assert decoder.codes is not None
    with pytest.raises(UnsupportedRecipe, match="order of activation"):
        decoder.codes("m", stored)


# ------------------------------------------------------------------------------------------------ whole models


def made(workspace: Path, folder: Path, *recipes: Any) -> Job:
    """Artifacts of a source in a folder, quantized or not; keep recipes as the plan resolves them."""
    source = resolve(ModelEntry(id=folder.name), folder.parent, keeps=True)
    own = [_for_source(source, shipped.recipe(item) if isinstance(item, str) else item) for item in recipes]
    strict = jobs.LOOSE.model_copy(update={"kl_mean": 1e-3, "kl_least": 0.0})
    job = jobs.job(folder, workspace, *own, thresholds=strict if source.kept else jobs.LOOSE)
    artifacts, _ = quantize(job, folder)
    assert [artifact.error for artifact in artifacts] == [None] * len(recipes)
    return job


def place(job: Job, name: str) -> Path:
    return next(Path(job.workspace, "artifacts").glob(f"{name}-*/"))


def checked(job: Job, folder: Path) -> None:
    for order in job.orders:
        manifest = verify(job, order, folder)
        assert manifest.verdict.accepted, manifest.verdict.reasons
        assert manifest.verdict.metrics is not None
        assert manifest.verdict.metrics.kl_mean < 1e-6
        assert manifest.source_check is not None
        assert not manifest.source_check.unchecked, manifest.source_check
        assert getattr(manifest.recipe, "source", None)


def available(environment: str) -> bool:
    try:
        interpreter(environment)
    except UserError:
        return False
    return True


def same_weights(job: Job, source: Path, name: str) -> None:
    pin = ModelPin(id="m", revision="r", folder=str(source))
    with open_source(source, pin) as original, open_decoded(place(job, name)) as artifact:
        assert isinstance(original, KeptSource)
        for key in original.headers:
            exact = original.exact(key)
            want = original.read(key) if exact is None else exact
            got = artifact.read(key)
            assert torch.equal(want.to(got.dtype), got), key


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-tiny in gptq's format, as a source."""
    recipe = jobs.recipe(name="g", method="rtn", scheme={"bits": 4, "group_size": 64}, format="gptq")
    job = made(tmp_path_factory.mktemp("gptq"), LLAMA, recipe)
    return place(job, "g").rename(tmp_path_factory.mktemp("source") / "llama-gptq")


@pytest.mark.slow
def test_gptq_becomes_compressed_tensors_and_mlx_and_comes_back(gptq: Path, tmp_path: Path) -> None:
    formats = ["keep-compressed-tensors", *(["keep-mlx"] if available("mlx") else [])]
    job = made(tmp_path / "one", gptq, *formats)
    checked(job, gptq)
    for name in formats:
        same_weights(job, gptq, name)
    back = place(job, "keep-compressed-tensors").rename(tmp_path / "llama-ct")
    again = made(tmp_path / "two", back, "keep-gptq")
    checked(again, back)
    with open_decoded(gptq) as first, open_decoded(place(again, "keep-gptq")) as last:
        assert {key: first.read(key).view(torch.uint8).sum().item() for key in first.headers} == {
            key: last.read(key).view(torch.uint8).sum().item() for key in last.headers
        }


@pytest.mark.night
@pytest.mark.timeout(900)
def test_awq_becomes_gptq_and_mlx_and_gptq_becomes_gguf(gptq: Path, tmp_path: Path) -> None:
    scheme = {"bits": 4, "group_size": 64, "symmetric": False}
    recipe = jobs.recipe(name="a", method="rtn", scheme=scheme, format="awq")
    awq = place(made(tmp_path / "one", LLAMA, recipe), "a").rename(tmp_path / "llama-awq")
    v2 = KeepRecipe(name="v2", method="keep", format="gptq-v2")
    job = made(tmp_path / "two", awq, v2, *(["keep-mlx"] if available("mlx") else []))
    checked(job, awq)
    same_weights(job, awq, "v2")
    if available("llama-cpp"):
        job = made(tmp_path / "three", gptq, "keep-gguf")
        checked(job, gptq)
        same_weights(job, gptq, "keep-gguf")


# ---------------------------------------------------------------------------------------------------- plan


def planned(tmp_path: Path, model: Path, recipes: str) -> Any:
    path = tmp_path / "zoo.yaml"
    path.write_text(
        f"name: small\nmodels: [{{id: {model}}}]\nrecipes: [{recipes}]\n"
        f"verify: {{dataset: {{path: text, data_files: [{jobs.ZOO}/text/heldout.txt]}}}}\n"
    )
    return make_plan(zoos.load(path), tmp_path, tmp_path / "runs", None)


def test_the_plan_takes_codes_and_says_what_would_be_lost(gptq: Path, tmp_path: Path) -> None:
    recipes = "keep-compressed-tensors, keep-gptq, rtn-w4-g128, {name: to-awq, method: keep, format: awq}"
    plan = planned(tmp_path, gptq, recipes)
    (keep, awq) = (artifact.order for artifact in plan.artifacts)
    assert keep.recipe.source == "gptq"
    assert keep.recipe.scheme == IntScheme(bits=4, group_size=64)
    assert keep.recipe.ignore == ()
    assert keep.thresholds.kl_least == 0
    assert awq.recipe.scheme == IntScheme(bits=4, group_size=64, symmetric=False)
    refused = {cell.recipe: cell.failure.message for cell in plan.refused}
    assert "has the format gptq already" in refused["keep-gptq"]
    assert "is quantized already (gptq), and recipe 'rtn-w4-g128' quantizes" in refused["rtn-w4-g128"]
    plain = planned(tmp_path, LLAMA, "keep-mlx").refused
    assert "converts a checkpoint that is quantized already" in plain[0].failure.message


def test_a_quantized_source_is_refused_as_before_without_keep(gptq: Path, tmp_path: Path) -> None:
    (cell,) = planned(tmp_path, gptq, "rtn-w4-g128").refused
    assert "quantized already, got quant_method 'gptq'; name the original" in cell.failure.message
    config = json.loads((gptq / "config.json").read_text())
    other = shutil.copytree(gptq, tmp_path / "other")
    config["quantization_config"] = {"quant_method": "quark"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="codes are of the kind 'quark', and those of gptq, gptq-v2, awq"):
        resolve(ModelEntry(id="other"), tmp_path, keeps=True)


def test_asymmetric_codes_name_the_formats_that_hold_them(tmp_path: Path) -> None:
    recipe = jobs.recipe(
        name="a", method="rtn", scheme={"bits": 4, "group_size": 64, "symmetric": False}, format="gptq"
    )
    folder = place(made(tmp_path / "one", LLAMA, recipe), "a").rename(tmp_path / "asymmetric")
    (cell,) = planned(tmp_path, folder, "keep-gguf").refused
    assert "gguf would lose the zero points" in cell.failure.message
    assert "format: compressed-tensors or gptq-v2 or awq or mlx can hold it all" in cell.failure.message
    (cell,) = planned(tmp_path, folder, "keep-compressed-tensors").refused
    assert "have zero points, for which transformers makes tensors of another size" in cell.failure.message
    order: Order = planned(tmp_path, folder, "keep-mlx").artifacts[0].order
    assert order.recipe.scheme == IntScheme(bits=4, group_size=64, symmetric=False)
