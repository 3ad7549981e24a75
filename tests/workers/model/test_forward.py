"""The streamed forward: bit by bit the plain one, with one layer in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from greenlet import greenlet
from torch import nn

from tests.workers.families import FAMILIES, GROUPED, save_random
from workers.checkpoint.source import Source
from workers.errors import CheckpointError, UnsupportedModel
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel

ZOO = Path(__file__).parents[2] / "zoo" / "models"


def tokens(count: int = 3, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (2, length), generator=generator) for _ in range(count)]


def assert_logits_identical(folder: Path, plain: Any, dtype: torch.dtype) -> None:
    batches = tokens()
    with torch.inference_mode():
        expected = [plain(input_ids=batch, use_cache=False).logits for batch in batches]
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=dtype)
        hidden = stream(streamed, batches)
        head = LogitsHead(streamed)
        for got, want in zip(hidden, expected, strict=True):
            assert torch.equal(head.logits(got), want)
    assert expected[0].std() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical(family: str, tmp_path: Path) -> None:
    assert_logits_identical(tmp_path, save_random(family, tmp_path), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "deepseek_v3", "gpt2", "mamba"])
def test_logits_are_bit_identical_in_half_precision(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    assert_logits_identical(tmp_path, plain.eval(), torch.bfloat16)


def test_layers_of_different_kinds_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_other = {"attn_layer_period": 2, "expert_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
    jamba = tf.JambaConfig(
        **GROUPED, **every_other, num_experts=4, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False
    )
    monkeypatch.setitem(FAMILIES, "jamba", lambda: jamba)
    assert_logits_identical(tmp_path, save_random("jamba", tmp_path), torch.float32)


def in_memory(streamed: StreamedModel) -> list[int]:
    """The layers of which any stored tensor is in memory."""
    return [
        index
        for index, layer in enumerate(streamed.layers)
        if any(not tensor.is_meta for tensor in layer.state_dict().values())
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])
def test_one_layer_is_in_memory(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    seen: list[tuple[int, list[int]]] = []
    parameters: list[tuple[int, weakref.ref[nn.Parameter]]] = []
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        for number, layer in enumerate(streamed.layers):
            layer.register_forward_hook(lambda *_, number=number: seen.append((number, in_memory(streamed))))

        def visit(index: int) -> None:
            seen.append((index, in_memory(streamed)))
            assert [number for number, held in parameters if held() is not None] == []
            parameters.extend((index, weakref.ref(parameter)) for parameter in streamed.layers[index].parameters())

        stream(streamed, tokens(), after_layer=visit)
        assert in_memory(streamed) == []
    assert seen == [(index, [index]) for index in range(len(streamed.layers)) for _ in range(len(tokens()) + 1)]
    assert [number for number, held in parameters if held() is not None] == []


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-moe-tiny", "gpt2-tiny"])
def test_logits_of_the_zoo_are_bit_identical(name: str) -> None:
    folder = ZOO / name
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.set_experts_implementation("eager")
    batches = [torch.randint(3, 2048, (2, 64), generator=torch.Generator().manual_seed(3))]
    with torch.inference_mode():
        expected = plain(input_ids=batches[0], use_cache=False).logits
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)
        assert torch.equal(LogitsHead(streamed).logits(stream(streamed, batches)[0]), expected)


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


class Broken(Exception):
    pass


def test_an_error_in_a_lane_comes_out_as_it_is(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        with pytest.raises(IndexError):
            stream(streamed, [*tokens(1), torch.full((2, 24), 10_000)])
        assert_clean(streamed)


@pytest.mark.parametrize("where", ["in the second lane", "after the layer"])
def test_an_error_half_way_ends_all_lanes(where: str, tmp_path: Path) -> None:
    plain = save_random("llama", tmp_path)
    calls: list[int] = []

    def break_second(module: nn.Module, inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Broken

    def break_after(index: int) -> None:
        if index == 1:
            raise Broken

    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        hook = streamed.layers[1].get_submodule("mlp").register_forward_pre_hook(break_second)
        with pytest.raises(Broken):
            stream(streamed, tokens(), after_layer=break_after if where == "after the layer" else None)
        hook.remove()
        assert_clean(streamed)
        # What is left can stream again.
        hidden = stream(streamed, tokens())
        with torch.inference_mode():
            want = plain(input_ids=tokens()[0], use_cache=False).logits
        assert torch.equal(LogitsHead(streamed).logits(hidden[0]), want)


def assert_clean(streamed: StreamedModel) -> None:
    """No lane half way, no hook, no layer in memory."""
    gc.collect()
    assert [lane for lane in gc.get_objects() if type(lane) is greenlet and lane and lane.parent is not None] == []
    assert [len(layer._forward_pre_hooks) for layer in streamed.layers] == [0] * len(streamed.layers)
    assert in_memory(streamed) == []


def test_a_forward_that_leaves_a_layer_out_is_refused(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        streamed.model.config.num_hidden_layers = 2
        with pytest.raises(UnsupportedModel, match="ends where layer 2 of 3"):
            stream(streamed, tokens())
        assert_clean(streamed)


class Reordered(nn.ModuleList):
    """Layers under their names, which a forward gets in another order."""

    order: tuple[int, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return [self[number] for number in self.order] if isinstance(index, slice) else super().__getitem__(index)


@pytest.mark.parametrize(
    ("order", "said"), [((0, 2, 1), "comes to layer 2 where layer 1 of 3"), ((0, 1, 2, 2), "again after the last")]
)
def test_a_forward_in_another_order_is_refused(order: tuple[int, ...], said: str, tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        streamed.model.model.layers = Reordered(streamed.layers)
        streamed.model.model.layers.order = order
        with pytest.raises(UnsupportedModel, match=said):
            stream(streamed, tokens())
        assert_clean(streamed)
