"""Which files are the model: as transformers itself resolves them, whatever else lies in the folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import _get_resolved_checkpoint_files

from workers.errors import CheckpointError, UnsupportedModel
from workers.machine.files import checkpoint_sha256, open_checkpoint
from workers.spec import checkpoint_files as files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
VARIED = ("model.fp16.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.fp16.bin")
OTHERS = (
    "consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "model.onnx",
    "rust_model.ot", "tf_model.h5", "flax_model.msgpack", "x.safetensors", "model.gguf", "params.json",
    "tokenizer.json",
)  # fmt: skip
ALL = (files.SINGLE, files.INDEX, files.PICKLE, files.PICKLE_INDEX, *SHARDS, *BINS, *VARIED, *OTHERS)


def lay(folder: Path, names: set[str], explicit: str | None) -> None:
    """Write files of those names; indices name two shards."""
    (folder / "config.json").write_text(json.dumps({"transformers_weights": explicit} if explicit else {}))
    for name in names:
        shards = BINS if name.startswith("pytorch") else SHARDS
        index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1]}}
        (folder / name).write_text(json.dumps(index) if ".index." in name else "")


def by_transformers(folder: Path, explicit: str | None, variant: str | None) -> list[str] | None:
    """The weight files that transformers takes, sorted; None: it finds none."""
    try:
        found, _ = _get_resolved_checkpoint_files(str(folder), variant, None, None, None, False, explicit)
    except (OSError, ValueError):
        return None
    assert found is not None
    # It doesn't look whether shards of a folder are there.
    return sorted(Path(name).name for name in found) if all(Path(name).exists() for name in found) else None


@settings(max_examples=400, deadline=None)
@given(
    st.sets(st.sampled_from(ALL)),
    st.sampled_from([None, None, None, "x.safetensors", files.INDEX, "gone.safetensors"]),
    st.sampled_from([None, None, "fp16"]),
)
def test_the_same_files_as_transformers(names: set[str], explicit: str | None, variant: str | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lay(folder, names, explicit)
        expected = by_transformers(folder, explicit, variant)
        if expected is None:
            with pytest.raises(CheckpointError):
                open_checkpoint(folder, "the model", variant=variant, allow_pickle=True)
            return
        found = open_checkpoint(folder, "the model", variant=variant, allow_pickle=True)
        assert sorted(found.weights) == expected
        # Each file is in one place, and none in two.
        places = [*found.weights, *([found.index] if found.index else []), *found.companions, *found.replaced]
        left_out = [name for name, _ in found.left_out]
        assert sorted([*places, *left_out]) == sorted([*names, "config.json"])
        assert set(found.companions) <= {"tokenizer.json"}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(ALL)))
def test_pickles_are_asked_for_only_where_there_is_nothing_else(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        lay(Path(place), names, None)
        found = by_transformers(Path(place), None, None)
        if found is None:
            return
        if any(name.endswith(".safetensors") for name in found):
            assert not open_checkpoint(Path(place), "the model").pickled
            return
        with pytest.raises(UnsupportedModel, match="allow_pickle: true"):
            open_checkpoint(Path(place), "the model")


NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(NAME, st.sampled_from(["", ".json", ".txt", ".safetensors", ".bin", ".py", ".model", "/x.json", ".onnx_data"]))
def test_no_weights_and_nothing_that_cannot_be_stored_are_companions(stem: str, ending: str) -> None:
    name = stem + ending
    found = files.checkpoint_files({files.SINGLE: 1, name: 1}, lambda asked: b"{}", "the model")
    if name in found.companions:
        assert files.safe_name(name)
        assert not name.endswith((".safetensors", ".bin", ".onnx_data"))
        assert name.isprintable()
    else:
        assert name in {files.SINGLE, *found.replaced, *(left for left, _ in found.left_out)}


@pytest.mark.parametrize(
    "name",
    [
        "runs/events.json", "checkpoint-500/config.json", "wandb/x.json", "global_step1/x.json", "original/params.json",
        "onnx/config.json", "trainer_state.json", "training_args.json", "all_results.json", "adapter_config.json",
        "openvino_tokenizer.xml", "calibration.txt", "zoo.yaml", "hf_quant_config.json", "model.safetensors.index.json",
        "a/.cache/x.json", "events.out.tfevents.17", "data.csv",
    ],
)  # fmt: skip
def test_what_is_never_copied(name: str) -> None:
    found = files.checkpoint_files({files.SINGLE: 1, name: 1}, lambda asked: b"{}", "the model")
    assert name in dict(found.left_out)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "merges.txt", "vocab.txt",
        "vocab.bpe", "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE", "LICENSE.txt", "NOTICE",
        "Notice.md",
        "USE_POLICY.md", "modeling_x.py", "ops/kernel.py", "generation_config.json", "preprocessor_config.json",
        "qwen.tiktoken", "spiece.model", "special_tokens_map.json", "added_tokens.json", "assets/picture.png",
    ],
)  # fmt: skip
def test_what_is_copied(name: str) -> None:
    found = files.checkpoint_files({files.SINGLE: 1, name: 1}, lambda asked: b"{}", "the model")
    assert found.companions == (name,)


def test_what_is_left_out_does_not_pin_a_folder(tmp_path: Path) -> None:
    lay(tmp_path, {files.SINGLE, "tokenizer.json"}, None)
    before = checkpoint_sha256(tmp_path, open_checkpoint(tmp_path, "the model"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_text("x")
    assert checkpoint_sha256(tmp_path, open_checkpoint(tmp_path, "the model")) == before
    (tmp_path / "tokenizer.json").write_text("{}")
    assert checkpoint_sha256(tmp_path, open_checkpoint(tmp_path, "the model")) != before


def test_a_snapshot_of_the_hubs_client_may_link_to_its_blobs_alone(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "1").write_text("{}")
    (tmp_path / "outside").write_text("{}")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", files.SINGLE):
        (snapshot / name).symlink_to("../../blobs/1")
    assert open_checkpoint(snapshot, "the model").weights == (files.SINGLE,)
    (snapshot / "LICENSE").symlink_to("../../../outside")
    with pytest.raises(CheckpointError, match=r"LICENSE is a link that leads out of the folder"):
        open_checkpoint(snapshot, "the model")
