"""Scripts of archived libraries: configs of a transformers 5 in older words, and folds that they don't record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.planning import fitting, sources
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers.families import save_random
from workers.checkpoint.source import Source
from workers.engines.libraries import older, speak
from workers.formats.folded import Folded

LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {"rope_theta": 1e4}),
        (
            {"rope_parameters": LLAMA3},
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
        ),
        ({"rope_theta": 1e6, "torch_dtype": "float16"}, {"rope_theta": 1e6, "torch_dtype": "float16"}),
    ],
)
def test_a_config_is_said_in_older_words(new: dict[str, Any], old: dict[str, Any]) -> None:
    before = json.dumps(new)
    assert older.older({**new, "model_type": "x"}) == {**old, "model_type": "x"}
    assert json.dumps(new) == before


def test_what_has_no_older_word_is_refused(tmp_path: Path) -> None:
    by_type = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(
        speak.Refused, match=r"differ by layer type .full_attention, sliding_attention.*leave engine out"
    ):
        older.older({"rope_parameters": by_type})


def test_the_source_is_linked_and_never_written(tmp_path: Path) -> None:
    source = tmp_path / "source-of-ours"
    source.mkdir()
    (source / "config.json").write_text('{"dtype": "bfloat16"}')
    (source / "model.safetensors").write_bytes(b"weights")
    folder = older.linked(source, tmp_path)
    assert json.loads((folder / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert json.loads((source / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert (folder / "model.safetensors").resolve() == (source / "model.safetensors").resolve()


def _library(tmp_path: Path, *, forgets: bool = False) -> tuple[Path, Path, speak.Folds]:
    """What a library makes of a norm and two linear layers by folding, as ``store`` leaves it; and its record."""
    source, saved, out = (tmp_path / name for name in ("source", "saved", "out"))
    for folder in (source, saved, out):
        folder.mkdir()
    torch.manual_seed(0)
    plain = {"n.weight": torch.rand(4) + 0.5, "v.weight": torch.randn(6, 4), "v.bias": torch.randn(6)}
    plain = {name: tensor.bfloat16() for name, tensor in (plain | {"o.weight": torch.randn(4, 4)}).items()}
    save_file(plain, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    s_I, t_I = torch.tensor([0.5, 3.0, 1.7, 0.9]), torch.tensor([1.3, 0.6, 2.2, 4.1])
    folds = speak.Folds()
    norm, linear = nn.RMSNorm(4), nn.Linear(4, 6)
    folds.add("n", norm, ["v"], s_I)
    folds.add("v", linear, ["o"], t_I)  # the last four of its six outputs
    divided = plain["n.weight"].float() / (torch.ones(4) if forgets else s_I)
    bias = plain["v.bias"].float() / torch.cat([torch.ones(2), t_I])
    codes = torch.zeros(2, 4, dtype=torch.int32)
    made = {"n.weight": divided.half(), "v.qweight": codes, "v.bias": bias.half(), "o.qweight": codes.clone()}
    save_file(made, saved / "model.safetensors")
    (saved / "config.json").write_text('{"quantization_config": {"quant_method": "q"}}')
    request = {"source": str(source), "out": str(out), "folds": str(tmp_path / "folds"), "modules": ["v", "o"]}
    speak.store(request, saved, folds)
    return source, out, folds


def test_recorded_folds_give_the_source_that_the_artifact_has(tmp_path: Path) -> None:
    source, out, _ = _library(tmp_path)
    stored = load_file(out / "model.safetensors")
    with Source(source) as plain:
        folded = Folded(plain, tmp_path / "folds", frozenset())
        assert folded.changed == {"n.weight", "v.weight", "v.bias", "o.weight"}
        for name in ("n.weight", "v.bias"):
            assert stored[name].dtype == torch.bfloat16
            assert not torch.equal(stored[name], plain.read(name))
            assert torch.equal(stored[name], folded.read(name)), name
        # (W diag(s)) (diag(1/s) x) = W x, the norm's and the value's folds alike.
        x_I = torch.randn(4, generator=torch.Generator().manual_seed(1))
        want = plain.read("v.weight").float() @ (plain.read("n.weight").float() * x_I)
        got = folded.read("v.weight") @ (x_I / torch.tensor([0.5, 3.0, 1.7, 0.9]) * plain.read("n.weight").float())
        rows_O = torch.cat([torch.ones(2), torch.tensor([1.3, 0.6, 2.2, 4.1])])
        torch.testing.assert_close(got * rows_O, want)
        want = plain.read("o.weight").float() @ want[2:]
        torch.testing.assert_close(folded.read("o.weight") @ got[2:], want)


def test_a_norm_that_differs_from_the_record_is_stored_as_it_is(tmp_path: Path) -> None:
    source, out, _ = _library(tmp_path, forgets=True)
    stored = load_file(out / "model.safetensors")
    with Source(source) as plain:
        folded = Folded(plain, tmp_path / "folds", frozenset())
        assert not torch.equal(stored["n.weight"], folded.read("n.weight")), "verification finds it"


@pytest.mark.parametrize(
    ("recipe", "family"),
    [("autoawq-w4-g128", "gpt_neox"), ("autoawq-w4-g128", "gemma2"), ("autogptq-w4-g128", "qwen3")],
)
def test_a_type_that_a_library_does_not_know_is_refused_by_the_plan(recipe: str, family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path / "model")
    source = sources.resolve(ModelEntry(id=str(tmp_path / "model")), tmp_path)
    (problem, *_) = fitting.recipe_problems(source, shipped.recipe(recipe))
    assert f"is of the type {family!r}" in problem
    assert "llama" in problem
    assert "leave engine out" in problem
