"""The rows of model families are read where models are built and their layers are found."""

from pathlib import Path

import pytest

from tests.workers.families import save_random
from workers.checkpoint.source import Source
from workers.errors import UnsupportedModel
from workers.model.loading import StreamedModel
from workers.spec.families import FAMILIES, Family, family_of


def layers_of(folder: Path) -> str:
    import torch

    with Source(folder) as source:
        return StreamedModel(folder, source, dtype=torch.float32).layers_name


def test_a_family_without_a_row_has_nothing_against_it() -> None:
    assert family_of("never heard of") == family_of(None) == Family()
    assert family_of("gpt2").conv1d
    assert family_of("zamba").refused


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
