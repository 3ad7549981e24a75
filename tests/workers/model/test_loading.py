"""Loading layer by layer, against transformers' own from_pretrained. Fails when the internals that it rests on move."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from tests.workers.families import FAMILIES, save_random
from workers.checkpoint.source import Source, TensorSource
from workers.errors import CheckpointError, UnsupportedModel
from workers.model.loading import StreamedModel, owners_of_keys


def edit(folder: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Change tensors of a checkpoint; None takes one out."""
    tensors = load_file(folder / "model.safetensors") | dict(change)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


class Noting:
    """A source of tensors that notes which are read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.headers = source.headers
        self.read_names: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return self._source.read(name)


def streamed(folder: Path, source: TensorSource, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(folder, source, dtype=dtype)


def everything(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_one_that_from_pretrained_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    generator = torch.Generator().manual_seed(3)
    stored = load_file(tmp_path / "model.safetensors")
    # Biases and norms are 0 or 1 at first, which any dtype holds exactly.
    edit(tmp_path, {k: torch.randn(t.shape, generator=generator) for k, t in stored.items() if t.is_floating_point()})
    plain = everything(tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source, dtype)
        loaded.load_outside()
        for index in range(len(loaded.layers)):
            loaded.load_layer(index)
        found = everything(loaded.model)
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_the_part_of_the_parameter_that_it_says(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source)
        for index in range(len(loaded.layers)):
            loaded.load_layer(index)
        for weight in loaded.weights:
            tensor = source.read(weight.key)
            name, expert = weight.input
            parameter = loaded.model.get_parameter(name)
            rows, width = weight.shape_OI
            assert tensor.shape == ((width, rows) if weight.transposed else (rows, width))
            if expert is None:
                assert torch.equal(parameter, tensor), weight
            else:  # gate and up lie one after the other
                assert torch.equal(parameter[expert][:rows], tensor) or torch.equal(parameter[expert][-rows:], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_one_place(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source)
        placed = [key for index in range(len(loaded.layers)) for key in loaded.keys_of_layer(index)]
        assert sorted([*placed, *loaded.outside_keys]) == sorted(source.headers)
        assert loaded.unexpected == ()
        assert owners_of_keys(loaded.model, source.headers).keys() == source.headers.keys()
        for index in range(len(loaded.layers)):
            # Families number their layers in different places, but all by the first number of a key.
            numbers = {re.findall(r"\.(\d+)\.", "." + key)[0] for key in loaded.keys_of_layer(index)}
            assert numbers == {str(index)}
    transposed = {weight.transposed for weight in loaded.weights}
    assert transposed == {family == "gpt2"}


def test_a_freed_layer_is_back_on_meta_and_can_come_again(tmp_path: Path) -> None:
    save_random("qwen3_moe", tmp_path)
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source)
        loaded.load_outside()
        loaded.load_layer(1)
        first = {name: tensor.clone() for name, tensor in loaded.layers[1].state_dict().items()}
        loaded.free_layer(1)
        assert all(tensor.is_meta for tensor in loaded.layers[1].state_dict().values())
        loaded.load_layer(1)
        again = loaded.layers[1].state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_tied_heads_share_their_weight(tmp_path: Path) -> None:
    save_random("gemma2", tmp_path)
    with Source(tmp_path) as source:
        assert "lm_head.weight" not in source.headers
        loaded = streamed(tmp_path, source)
        loaded.load_outside()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert not loaded.model.lm_head.weight.is_meta


def test_keys_without_use_are_told_and_never_read(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    unused = {"model.layers.3.self_attn.q_proj.weight": torch.zeros(32, 32), "model.extra": torch.zeros(1)}
    edit(tmp_path, unused)
    with Source(tmp_path) as source:
        noting = Noting(source)
        loaded = streamed(tmp_path, noting)
        loaded.load_outside()
    assert sorted(loaded.unexpected) == sorted(unused)
    assert set(unused) <= set(loaded.outside_keys)
    assert sorted(noting.read_names) == sorted(set(loaded.outside_keys) - set(unused))


@pytest.mark.parametrize(
    "absent",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"],
)
def test_an_absent_tensor_is_named(absent: str, tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    edit(tmp_path, {absent: None})
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source)

        def load_all() -> None:
            loaded.load_outside()
            for index in range(len(loaded.layers)):
                loaded.load_layer(index)

        with pytest.raises(CheckpointError, match=re.escape(f"'{absent}'")):
            load_all()


@pytest.mark.parametrize("absent", [["up_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_an_absent_expert_is_named_before_anything_is_read(absent: list[str], tmp_path: Path) -> None:
    save_random("qwen3_moe", tmp_path)
    keys = [f"model.layers.1.mlp.experts.2.{name}.weight" for name in absent]
    edit(tmp_path, dict.fromkeys(keys))
    with Source(tmp_path) as source, pytest.raises(CheckpointError) as caught:
        streamed(tmp_path, source)
    assert all(f"'{key}'" in str(caught.value) for key in keys)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    edit(tmp_path, {"model.layers.1.self_attn.q_proj.weight": torch.zeros(16, 32)})
    with Source(tmp_path) as source, pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        streamed(tmp_path, source).load_layer(1)


def test_what_its_loader_does_not_know_is_refused(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    tf.ViTConfig().save_pretrained(tmp_path)
    with Source(tmp_path) as source, pytest.raises(UnsupportedModel, match=r"ViTConfig.*AutoModelForCausalLM\.\)$"):
        streamed(tmp_path, source)


def test_the_model_is_built_without_weights_and_for_inference(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    with Source(tmp_path) as source:
        loaded = streamed(tmp_path, source)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert (loaded.layers_name, len(loaded.layers)) == ("model.layers", 3)
    assert isinstance(loaded.base, nn.Module)
