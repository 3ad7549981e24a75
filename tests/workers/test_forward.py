"""The streamed forward: bit by bit the plain one, with one layer in memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.families import FAMILIES, save_random
from workers.checkpoint import Source
from workers.errors import CheckpointError
from workers.forward import Head, stream
from workers.loading import StreamedModel

ZOO = Path(__file__).parents[1] / "zoo" / "models"


def tokens(count: int = 3, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (2, length), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical_with_one_layer_in_memory(family: str, tmp_path: Path) -> None:
    plain = save_random(family, tmp_path)
    batches = tokens()
    with torch.inference_mode():
        expected = [plain(input_ids=batch, use_cache=False).logits for batch in batches]
    in_memory = []
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)

        def count(index: int) -> None:
            in_memory.append([all(not p.is_meta for p in layer.parameters()) for layer in streamed.layers])

        hidden = stream(streamed, batches, after_layer=count)
        head = Head(streamed)
        for got, want in zip(hidden, expected, strict=True):
            assert torch.equal(head.logits(got), want)
    layers = len(in_memory)
    assert in_memory == [[column == row for column in range(layers)] for row in range(layers)]
    assert expected[0].std() > 1e-3


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-moe-tiny", "gpt2-tiny"])
def test_logits_of_the_zoo_are_bit_identical(name: str) -> None:
    folder = ZOO / name
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.set_experts_implementation("eager")
    batches = [torch.randint(3, 2048, (2, 64), generator=torch.Generator().manual_seed(3))]
    with torch.inference_mode():
        expected = plain(input_ids=batches[0], use_cache=False).logits
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)
        assert torch.equal(Head(streamed).logits(stream(streamed, batches)[0]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_found_by_what_they_are(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        matrices = {
            key
            for index in range(len(streamed.layers))
            for key in streamed.keys_of_layer(index)
            if len(source.headers[key].shape) == 2
        }
    found = {weight.key for weight in streamed.weights}
    # What is left is no linear layer: routers, Mamba's state matrix.
    left = {key.rpartition("layers.")[2].partition(".")[2] for key in matrices - found}
    assert left <= {"mlp.gate.weight", "block_sparse_moe.gate.weight", "mixer.A_log"}
    assert found


def test_a_checkpoint_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_random("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            stream(streamed, tokens())


def test_an_error_in_a_lane_comes_out_as_it_is(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        with pytest.raises(IndexError):
            stream(streamed, [*tokens(1), torch.full((2, 24), 10_000)])
        hooks = [len(layer._forward_pre_hooks) for layer in streamed.layers]
        assert hooks == [0] * len(hooks)
