"""Checkpoints on disk: what can be read, what is refused, and that nothing half-written looks whole."""

import json
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.checkpoint.shards import Journal, ShardWriter
from workers.checkpoint.source import DTYPES, INDEX, Header, Source, copy_companions
from workers.errors import CheckpointError, QuantmillError, UnsupportedModel
from workers.machine.files import open_checkpoint, write_text

SINGLE = "model.safetensors"


def write_sharded(folder: Path) -> dict[str, Tensor]:
    """Three tensors in two shards, as the Hub has them."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    with ShardWriter(folder, max_shard_bytes=24) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    return tensors


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    # Some of the bytes are NaN, which equals nothing: so the bytes are compared.
    tensor = torch.arange(64, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else torch.eye(3).bool()
    with ShardWriter(tmp_path) as writer:
        writer.add("x", tensor)
        writer.close()
    with Source(tmp_path) as source:
        assert source.headers == {"x": Header(tuple(tensor.shape), dtype)}
        assert torch.equal(source.read("x").view(torch.uint8), tensor.view(torch.uint8))


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    with Source(tmp_path) as source:
        assert list(source.headers) == list(tensors)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
        assert source.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        with pytest.raises(CheckpointError, match="'d'"):
            source.read("d")


def spoil_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def cut(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])


def repeat_a_key(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, r"model-00002-of-00002\.safetensors: truncated"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""), "model-00001.*truncated"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 64), "truncated or no"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            r"names \['model-00002.*1 of its 2 shards aren't there",
        ),
        (repeat_a_key, "'a' stands in two shards"),
        (spoil_index("{"), "not readable JSON"),
        (spoil_index("[]"), "weight_map must map"),
        (spoil_index('{"weight_map": []}'), "weight_map must map"),
        (spoil_index('{"weight_map": {"a": 3}}'), "weight_map must map"),
        (spoil_index('{"metadata": {}}'), "weight_map must map"),
    ],
)
def test_broken_shards_are_refused_with_a_remedy(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        Source(tmp_path)
    assert re.search(r"; (complete|save|remove|replace|write)|, or save it anew", str(caught.value)), "no remedy"
    assert "fetch it again" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        Source(tmp_path)


def test_an_unknown_dtype_is_not_called_truncated(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="got 'C64', expected one of F64") as caught:
        Source(tmp_path)
    assert "truncated" not in str(caught.value)


def test_pickles_are_read_only_where_they_are_allowed(tmp_path: Path) -> None:
    file = "pytorch_model.bin"
    torch.save({"x": torch.ones(2, 3).T}, tmp_path / file)
    with pytest.raises(UnsupportedModel, match="allow_pickle: true"):
        Source(tmp_path)
    with Source(tmp_path, allow_pickle=True) as source:
        assert source.headers == {"x": Header((3, 2), torch.float32)}
        assert source.read("x").is_contiguous()
        assert source.bytes == (tmp_path / file).stat().st_size


class Runs:
    """Pickled, it asks for a call when it's loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.folder,)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"x": Runs(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Source(tmp_path / "model", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps({"x": 1})], ids=["empty", "garbage", "pickle of torch before 1.6"]
)
def test_an_unreadable_pickle_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        Source(tmp_path, allow_pickle=True)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="state_dict alone"):
        Source(tmp_path, allow_pickle=True)


def test_one_shard_is_named_as_one_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("x", torch.ones(2))
        writer.close()
    assert names(tmp_path) == {SINGLE}
    with safe_open(tmp_path / SINGLE, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_many_shards_have_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names(tmp_path) == {INDEX, *shards}
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 32},
        "weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]},
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_hold_everything_and_no_more_than_their_limit(lengths: list[int], limit: int) -> None:
    tensors = {f"layers.{index}.w": torch.full((length,), index).byte() for index, length in enumerate(lengths)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ShardWriter(folder, max_shard_bytes=limit) as writer:
            for key, tensor in tensors.items():
                writer.add(key, tensor)
            writer.close()
        stored = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        with Source(folder) as source:
            assert source.headers.keys() == tensors.keys()
            assert all(torch.equal(source.read(key), tensor) for key, tensor in tensors.items())
    assert all(len(shard) == 1 or sum(map(torch.numel, shard.values())) <= limit for shard in stored)
    assert sum(map(len, stored)) == len(tensors)


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_sharded(tmp_path / folder)
    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert all(
        (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        for name in names(tmp_path / "one")
    )


def test_a_view_is_stored_without_what_it_views(tmp_path: Path) -> None:
    whole = torch.arange(1_000_000.0)
    with ShardWriter(tmp_path) as writer:
        writer.add("x", whole[:4])
        writer.add("y", whole[:4])
        writer.add("t", whole[:6].view(2, 3).T)
        whole.zero_()  # what was added is the writer's own
        writer.close()
    assert (tmp_path / SINGLE).stat().st_size < 1000
    assert torch.equal(load_file(tmp_path / SINGLE)["t"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_no_final_name_before_the_end_and_nothing_left_without_one(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_shard_bytes=8) as writer:
        for index in range(4):
            writer.add(f"x{index}", torch.ones(2))
        assert len(names(tmp_path)) == 7
        assert all(name.startswith(".shard-") for name in names(tmp_path))
    assert names(tmp_path) == set()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=10), st.integers(1, 60), st.data())
def test_a_killed_writer_goes_on_to_the_same_bytes(lengths: list[int], limit: int, data: st.DataObject) -> None:
    tensors = {f"w{index}": torch.full((length,), index).byte() for index, length in enumerate(lengths)}
    keys = list(tensors)
    saved = data.draw(st.integers(0, len(keys) - 1))
    killed = data.draw(st.integers(saved, len(keys)))
    with tempfile.TemporaryDirectory() as name:
        quiet, torn = Path(name) / "quiet", Path(name) / "torn"
        with ShardWriter(quiet, limit) as writer:
            for key in keys:
                writer.add(key, tensors[key])
            writer.close()
        writer, journal = ShardWriter(torn, limit), Journal()
        for index, key in enumerate(keys[:killed]):
            writer.add(key, tensors[key])
            if index + 1 == saved:
                journal = writer.journal()
        writer.release()  # what a kill leaves: not closed, nothing cleared up
        again = ShardWriter(torn, limit, Journal.model_validate_json(journal.model_dump_json()))
        for key in keys[saved:]:
            again.add(key, tensors[key])
        again.close()
        assert names(torn) == names(quiet)
        assert all((torn / file).read_bytes() == (quiet / file).read_bytes() for file in names(quiet))


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("x", torch.ones(1))
        with pytest.raises(AssertionError, match="x was written twice"):
            writer.add("x", torch.ones(1))


def test_text_is_there_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "config.json", "old")
    write_text(tmp_path / "config.json", "neu: ü\n")
    assert (tmp_path / "config.json").read_bytes() == "neu: ü\n".encode()
    assert names(tmp_path) == {"config.json"}


def test_companions_are_copied_by_their_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = {
        "LICENSE",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "a/config.json",
        "a/README.md",
    }
    left = {
        "config.json", "README.md", "quantmill.json", ".gitattributes", ".git/config", ".cache/x", "__pycache__/m.pyc",
        SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "original/consolidated.00.pth", "x.pt",
        "model.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack",
    }  # fmt: skip
    for number, name in enumerate(sorted(kept | left)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes([number, 13, 10, 255]))
    (source / "config.json").write_text("{}")
    files = open_checkpoint(source, "the model")
    assert set(files.companions) == kept
    copy_companions(files, source, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == kept
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_all_refusals_are_ours() -> None:
    assert issubclass(CheckpointError, QuantmillError)
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(UnsupportedModel, ValueError)
