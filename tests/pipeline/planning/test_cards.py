"""What models of 8 and 70 billion weights need of a card, from their shapes alone."""

from __future__ import annotations

import pytest

from pipeline.fleet.placement import Node, Room, lacking
from pipeline.planning import sizing, sources
from pipeline.zoo import shipped
from workers.machine.preflight import Device, MachineFacts
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.job import ModelPin
from workers.spec.tensors import TensorHeader

TEXT = Dataset(path="text")
CALIBRATION = Calibration(dataset=TEXT, samples=128, sequence_length=2048)
GB = 10**9
# By weights: hidden, intermediate and key-value width, layers, heads.
LLAMA3 = {"8B": (4096, 14336, 1024, 32, 32), "70B": (8192, 28672, 1024, 80, 64)}
VOCABULARY = 128_256
CARDS = {"24": 24 << 30, "40": 40 << 30, "80": 80 << 30}


def llama3(size: str) -> sources.PinnedModel:
    """Llama 3's headers, without a file."""
    hidden, wide, narrow, layers, heads = LLAMA3[size]
    inside = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    outside = {"model.embed_tokens": (VOCABULARY, hidden), "model.norm": (hidden,), "lm_head": (VOCABULARY, hidden)}
    shapes = outside | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in inside.items()}
    config = {"model_type": "llama", "hidden_size": hidden, "vocab_size": VOCABULARY, "num_attention_heads": heads}
    tensors = tuple(TensorHeader(f"{name}.weight", shape, "BF16") for name, shape in shapes.items())
    return sources.PinnedModel(ModelPin(id=f"llama-3-{size}", revision="1"), config, tensors, size)


def estimate(size: str, recipe: str, sequence_length: int = 2048) -> sizing.Estimate:
    verification = Verification(dataset=TEXT, sequence_length=sequence_length)
    return sizing.estimate(llama3(size), shipped.recipe(recipe), CALIBRATION, verification)


def refused(size: str, recipe: str, memory: int) -> list[str]:
    """What a node with one card of so many bytes lacks for any stage, its host memory aside."""
    facts = MachineFacts(
        node="n", python="3", packages={}, devices=(Device(name="card", capability=(9, 0), memory=memory),),
        host_memory=10**13, disk_free=10**15, cpus=16,
    )  # fmt: skip
    found = estimate(size, recipe)
    room = Room(Node("n", 16, 1), facts)
    return [line for need in (found.quantize, found.verify) for line in lacking(room, need, 0, size)]


@pytest.mark.parametrize("size", LLAMA3)
def test_the_shapes_are_llamas(size: str) -> None:
    assert sizing.shape_of(llama3(size)).weights == {"8B": 8_030_261_248, "70B": 70_553_706_496}[size]


@pytest.mark.parametrize(
    ("size", "card", "fits"), [("8B", "24", True), ("8B", "40", True), ("70B", "80", True), ("70B", "24", False)]
)
@pytest.mark.parametrize("recipe", ["gptq-w4-g128", "awq-w4-g128", "fp8-dynamic", "bnb-nf4"])
def test_a_model_is_refused_only_by_a_card_that_cannot_hold_its_layers(
    size: str, card: str, fits: bool, recipe: str
) -> None:
    assert (refused(size, recipe, CARDS[card]) == []) is fits


def test_an_8b_packed_is_verified_on_a_card_of_24_gb_and_a_70b_on_80() -> None:
    """Streamed models, a second context and the artifact's own bytes, an eighth more, as the runtime's process asks."""
    for size, card in (("8B", "24"), ("70B", "80")):
        found = estimate(size, "gptq-w4-g128")
        second = found.artifact_bytes * 9 / 8 + sizing.DEVICE_BYTES
        assert found.verify.least_device + second < 0.9 * CARDS[card]


def test_logits_are_counted_by_the_piece() -> None:
    long, short = (estimate("8B", "bnb-nf4", length).verify.least_device for length in (8192, 512))
    # Longer sequences have larger attention scores (18 GB, were they all there); all logits would be 35 GB more.
    assert long - short < 20 * GB < sizing.LOGITS_BYTES * (8192 - 512) * VOCABULARY


def test_hidden_states_are_counted_where_they_wait() -> None:
    few, many = (
        sizing.estimate(
            llama3("8B"), shipped.recipe("gptq-w4-g128"),
            CALIBRATION.model_copy(update={"samples": samples}), Verification(dataset=TEXT),
        ).quantize.device
        for samples in (128, 512)
    )  # fmt: skip
    # In bfloat16, twice where the recipe propagates its own stream.
    streams = 1 + shipped.recipe("gptq-w4-g128").needs.own_stream
    assert many - few >= streams * 384 * 2048 * 4096 * 2
