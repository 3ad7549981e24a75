"""The rows of model families are read where models are built and their layers are found."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.workers.families import save_random
from workers.checkpoint.source import Source
from workers.errors import UnsupportedModel
from workers.model.loading import StreamedModel
from workers.spec.families import FAMILIES, Family, family_of, forward_of


def layers_of(folder: Path) -> str:
    import torch

    with Source(folder) as source:
        return StreamedModel(folder, source, dtype=torch.float32).layers_name


def test_a_family_without_a_row_has_nothing_against_it() -> None:
    assert family_of("never heard of") == family_of(None) == Family()
    assert family_of("gpt2").conv1d
    assert family_of("hrm_text").refused


def test_the_loader_is_the_one_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random("llama", tmp_path)
    assert layers_of(tmp_path) == "model.layers"
    monkeypatch.setitem(FAMILIES, "llama", Family(loader="AutoModelForImageTextToText"))
    with pytest.raises(UnsupportedModel, match=r"builds no model of it \(.*LlamaConfig.*ImageTextToText\.\)$"):
        layers_of(tmp_path)


def test_layers_are_those_of_the_text_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random("llama", tmp_path)
    monkeypatch.setitem(FAMILIES, "llama", Family(text_prefix="model"))
    assert layers_of(tmp_path) == "model.layers"
    monkeypatch.setitem(FAMILIES, "llama", Family(text_prefix="vision"))
    with pytest.raises(UnsupportedModel, match="no list of decoder layers"):
        layers_of(tmp_path)


def test_a_tensor_that_is_split_among_modules_is_none_of_their_weights(tmp_path: Path) -> None:
    import torch

    from tests.walk.smallest import save_smallest

    save_smallest("molmo2", tmp_path, multimodal=True)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        assert "model.transformer.blocks.0.self_attn.att_proj.weight" in streamed.keys_of_layer(0)
        names = [weight.module for weight in streamed.weights if weight.layer == 0]
    assert names == ["model.transformer.blocks.0.mlp.ff_out", "model.transformer.blocks.0.self_attn.attn_out"]


def test_a_row_names_the_part_whose_forward_takes_tokens() -> None:
    class Part:
        def __init__(self, model_type: str) -> None:
            self.config = SimpleNamespace(model_type=model_type)

        def get_submodule(self, name: str) -> str:
            return name

    assert forward_of(Part("qwen3_omni_moe")) == "thinker"
    whole = Part("llama")
    assert forward_of(whole) is whole
