"""The map of bitsandbytes against the library: the same bytes as from_pretrained + save_pretrained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.walk.smallest import save_smallest
from workers.checkpoint.source import Source
from workers.engines.bitsandbytes import plan
from workers.formats.decoded import Decoded, open_decoded
from workers.model.loading import StreamedModel
from workers.spec.formats import BNB_BLOCK
from workers.spec.job import ModelPin, fingerprint
from workers.spec.options import BitsAndBytesOptions
from workers.spec.recipes import BitsAndBytesRecipe
from workers.spec.schemes import FourBitFloatScheme, LlmInt8Scheme

NF4 = FourBitFloatScheme(type="nf4", double_quantization=True)
SCHEMES: dict[str, tuple[FourBitFloatScheme | LlmInt8Scheme, dict[str, Any]]] = {
    "nf4": (
        NF4.model_copy(update={"double_quantization": False}),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    ),
    "nf4-double": (
        NF4,
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
    ),
    "fp4": (
        FourBitFloatScheme(type="fp4", double_quantization=False),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    ),
    "llm-int8": (LlmInt8Scheme(outlier_threshold=4.5), {"load_in_8bit": True, "llm_int8_threshold": 4.5}),
}


def recipe_of(scheme: FourBitFloatScheme | LlmInt8Scheme, *ignore: str) -> BitsAndBytesRecipe:
    return BitsAndBytesRecipe(name="r", method="bitsandbytes", scheme=scheme, ignore=("lm_head", *ignore))


SMALL = {"vocab_size": 96, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, **ATTENTION, intermediate_size=128, tie_word_embeddings=False),
    "gpt2": lambda: tf.GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=32),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SMALL, **ATTENTION, moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2
    ),
}
HEADS = {"llama": ["lm_head"], "gpt2": [], "qwen3_moe": ["lm_head"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        tf.AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


def meta_model(folder: Path) -> StreamedModel:
    with Source(folder) as source:
        return StreamedModel(folder, source, dtype=torch.bfloat16, device=torch.device("cpu"))


def write_ours(source: Path, target: Path, recipe: BitsAndBytesRecipe) -> Any:
    from workers.engines import bitsandbytes as method

    plan = method.plan(meta_model(source), recipe)
    stored: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module in plan.converted and key != module:
            storage = getattr(torch, recipe.options.quant_storage)
            parts = method.quantize(tensor, recipe.scheme, transposed=module in plan.transposed, storage=storage)
            stored |= {f"{module}.{name}": part for name, part in parts.items()}
        else:
            stored[key] = tensor
    target.mkdir()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = method.quantization_config(recipe, torch.bfloat16, plan.skipped)
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "generation_config.json", target)
    return plan


def write_library(source: Path, target: Path, **settings: Any) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=tf.BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(target)


def assert_same_checkpoint(ours: Path, library: Path) -> None:
    got, want = load_file(ours / "model.safetensors"), load_file(library / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(got[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key
    assert json.loads((ours / "config.json").read_text()) == json.loads((library / "config.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bytes_as_the_library(name: str, scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    ours, settings = SCHEMES[scheme]
    write_ours(sources[name], tmp_path / "ours", recipe_of(ours))
    write_library(sources[name], tmp_path / "library", **settings)
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "library")


@pytest.mark.parametrize(
    ("scheme", "options", "settings"),
    [
        (
            "nf4-double",
            {"compute_dtype": "float16", "quant_storage": "bfloat16"},
            {"bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_quant_storage": torch.bfloat16},
        ),
        ("fp4", {"quant_storage": "float32"}, {"bnb_4bit_quant_storage": torch.float32}),
    ],
)
def test_options_are_the_librarys(
    scheme: str, options: dict[str, Any], settings: dict[str, Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    ours, known = SCHEMES[scheme]
    recipe = BitsAndBytesRecipe.model_validate(
        {"name": "r", "method": "bitsandbytes", "scheme": ours.model_dump(), "options": options, "ignore": ["lm_head"]}
    )
    write_ours(sources["llama"], tmp_path / "ours", recipe)
    write_library(sources["llama"], tmp_path / "library", **{**known, **settings})
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "library")
    write_ours(sources["llama"], tmp_path / "default", recipe_of(ours))
    with open_decoded(tmp_path / "ours") as one, open_decoded(tmp_path / "default") as other:
        assert isinstance(one, Decoded)
        assert len(one.quantized) == 14
        assert all(torch.equal(one.read(key), other.read(key)) for key in one.headers), "the storage changes no weight"


def test_offload_is_declared_and_the_artifact_still_loads_on_a_cpu(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(NF4).model_copy(update={"options": BitsAndBytesOptions(fp32_cpu_offload=True)})
    write_ours(sources["llama"], tmp_path / "ours", recipe)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_enable_fp32_cpu_offload"] is True
    _, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}


def test_options_of_four_bits_are_refused_for_eight() -> None:
    with pytest.raises(ValueError, match=r"options.compute_dtype is for layers of 4 bits, .* set scheme.type: nf4"):
        BitsAndBytesRecipe.model_validate(
            {
                "name": "r",
                "method": "bitsandbytes",
                "scheme": {"type": "llm-int8"},
                "options": {"compute_dtype": "bfloat16"},
            }
        )


def test_options_at_their_defaults_are_no_part_of_the_identity() -> None:
    pin, plain = ModelPin(id="org/name", revision="0" * 40), recipe_of(NF4)
    said = plain.model_copy(update={"options": BitsAndBytesOptions(compute_dtype=None, quant_storage="uint8")})
    other = plain.model_copy(update={"options": BitsAndBytesOptions(quant_storage="bfloat16")})
    prints = [fingerprint(pin, recipe, None, None) for recipe in (plain, said, other)]
    assert prints[0] == prints[1] != prints[2]


def test_ignored_modules_are_named_in_the_config(sources: dict[str, Path], tmp_path: Path) -> None:
    plan = write_ours(sources["llama"], tmp_path / "ours", recipe_of(NF4, "*.down_proj"))
    assert plan.skipped == ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    write_library(
        sources["llama"], tmp_path / "library", **SCHEMES["nf4-double"][1], llm_int8_skip_modules=list(plan.skipped)
    )
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "library")


def test_what_the_library_leaves_is_told(sources: dict[str, Path]) -> None:
    from workers.engines import bitsandbytes as method

    assert method.plan(meta_model(sources["llama"]), recipe_of(NF4)).unquantized == ()
    moe = method.plan(meta_model(sources["qwen3_moe"]), recipe_of(NF4))
    kept = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    assert sorted(moe.unquantized) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in kept)
    assert method.plan(meta_model(sources["qwen3_moe"]), recipe_of(NF4, "*.mlp.*")).unquantized == ()


def test_a_head_that_is_not_ignored_stays_and_is_told(sources: dict[str, Path]) -> None:
    from workers.engines import bitsandbytes as method

    recipe = recipe_of(NF4).model_copy(update={"ignore": ()})
    plan = method.plan(meta_model(sources["llama"]), recipe)
    assert plan.unquantized == ("lm_head.weight",)
    assert "lm_head" not in plan.converted


def test_planning_leaves_the_model_alone(sources: dict[str, Path]) -> None:
    from workers.engines import bitsandbytes as method

    model = meta_model(sources["gpt2"])
    before = [(name, type(module)) for name, module in model.model.named_modules()]
    plan = method.plan(model, recipe_of(NF4))
    assert [(name, type(module)) for name, module in model.model.named_modules()] == before
    assert plan.transposed == plan.converted != frozenset()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_computes_what_we_decode(name: str, scheme: str, sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(SCHEMES[scheme][0])
    write_ours(sources[name], tmp_path / "ours", recipe)
    model, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}

    with open_decoded(tmp_path / "ours") as ours:
        save_file({key: ours.read(key) for key in ours.headers}, tmp_path / "model.safetensors")
    shutil.copy(sources[name] / "config.json", tmp_path)
    decoded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)

    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    want, got = decoded(ids).logits.float(), model(ids).logits.float()
    # bfloat16 both; LLM.int8 rounds the activations to 8 bits as well.
    assert (got - want).abs().max() < (0.25 if scheme == "llm-int8" else 0.08) * want.std()


# Half the widest gap of a codebook, as a share of the block's largest value (of the row's, in LLM.int8). 8-bit absmax
# values add their own error to it.
HALF_STEP = {"nf4": 0.1520, "nf4-double": 0.1520 + 0.03, "fp4": 1 / 6, "llm-int8": 0.5 / 127}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(48, 80), (64, 128), (3, 22)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_is_within_half_a_step(scheme: str, shape: tuple[int, int], transposed: bool) -> None:
    from workers.engines import bitsandbytes as method
    from workers.formats import bitsandbytes as bnb_format

    chosen = SCHEMES[scheme][0]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored = method.quantize(weight.T if transposed else weight, chosen, transposed=transposed)
    decoded = bnb_format.decode(stored, transposed=transposed)
    decoded = decoded.T if transposed else decoded
    assert decoded.shape == weight.shape
    length = shape[1] if scheme == "llm-int8" else BNB_BLOCK
    pad = -weight.numel() % length
    error, limit = (
        torch.nn.functional.pad(t.flatten(), (0, pad)).view(-1, length).abs().amax(1)
        for t in (decoded - weight, weight)
    )
    # float16 on the way to int8.
    assert (error <= limit * (HALF_STEP[scheme] + 2**-10)).all()
    if scheme != "nf4-double":
        again = method.quantize(decoded, chosen, transposed=False)
        assert torch.equal(bnb_format.decode(again, transposed=False), decoded)


# openai-community/gpt2 and others leave out the prefix of the base model.
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_is_like_its_source(
    name: str, scheme: str, prefix: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    plan = write_ours(sources[name], tmp_path / "ours", recipe_of(SCHEMES[scheme][0]))
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    save_file({key.removeprefix(prefix): t for key, t in stored.items()}, tmp_path / "ours" / "model.safetensors")
    with open_decoded(tmp_path / "ours") as decoded, Source(sources[name]) as original:
        assert isinstance(decoded, Decoded)
        assert decoded.quantized == {module.removeprefix(prefix) for module in plan.converted}
        assert decoded.headers.keys() == {key.removeprefix(prefix) for key in original.headers}
        for key, header in original.headers.items():
            got, want = decoded.read(key.removeprefix(prefix)), original.read(key)
            assert decoded.headers[key.removeprefix(prefix)].shape == header.shape == tuple(got.shape)
            assert decoded.headers[key.removeprefix(prefix)].dtype == got.dtype
            quantized = key.removesuffix(".weight") in plan.converted
            assert ((got - want).abs().max() > 0) == quantized, key
            assert (got - want).abs().max() <= 0.2 * want.abs().max(), key


def test_what_casts_its_input_to_its_weights_dtype_stays(tmp_path: Path) -> None:
    # transformers computes with the bytes of a packed layer there, without an error.
    save_smallest("glm5_next", tmp_path, multimodal=True)
    with Source(tmp_path) as source:
        planned = plan(StreamedModel(tmp_path, source, dtype=torch.float32), recipe_of(NF4))
    indexer = "model.language_model.layers.1.self_attn.indexer"
    assert f"{indexer}.weights_proj" in (planned.skipped or ())
    assert f"{indexer}.weights_proj.weight" in planned.unquantized
    assert f"{indexer}.wk" in planned.converted
