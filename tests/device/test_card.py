"""The stand-in for a card refuses what a card refuses, and counts what costs time there."""

import json
from typing import Any

import pytest

from tests.bench import bench_counts, gpu_stack
from tests.device import card
from workers.spec.workspace import MICRO_BATCH_TOKENS

pytestmark = pytest.mark.timeout(600)  # the first of them compiles for half a minute, on busy cores for longer


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(card.run("tests.device.work", "tensors", memory=1 << 20, cards=2))
    return found


def test_two_devices_are_refused(seen: dict[str, Any]) -> None:
    assert "found at least two devices" in seen["mixed"]["message"]
    assert "found at least two devices" in seen["two cards"]["message"]
    assert "invalid device ordinal" in seen["third card"]["message"]


def test_more_memory_than_there_is_is_refused_with_torchs_own_error(seen: dict[str, Any]) -> None:
    assert seen["too large"]["class"] == "OutOfMemoryError"
    assert seen["too large"]["kind"] == "OutOfMemory"


def test_a_poisoned_card_fails_ever_after(seen: dict[str, Any]) -> None:
    assert [seen[name]["kind"] for name in ("poisoned", "still poisoned")] == ["DeviceLost", "DeviceLost"]


def test_launches_waits_and_bytes_are_counted(seen: dict[str, Any]) -> None:
    # To the card 4 x 4 float32; a product, a view (none) and a sum; one number back, which waits, and 64 bytes.
    counted = {name: count for name, count in seen["counted"].items() if count}
    by_card = [[2, 3 * 512], [0, 0]]
    assert counted == {"launches": 2, "waits": 3, "to": 64, "from_": 64, "peak": 3 * 512, "by_card": by_card}


def test_a_layer_comes_from_pinned_memory_on_a_stream_of_its_own_and_is_waited_for() -> None:
    found = json.loads(card.run("tests.device.work", "uploads", memory=1 << 20))
    assert "hasn't waited for it" in found["early"]["message"]
    assert found["same"]
    whole, on_demand = found["whole"], found["on demand"]
    assert whole["to"] == whole["aside"] == 20_000
    assert whole["unrecorded"] == 0, "memory isn't given back while it may be read"
    # Three layers of 400 kB don't fit into a quarter of 1 MiB: tensors come as often as they are asked for.
    assert found["alike"]
    assert found["before"] == [0, 0]
    assert (on_demand["to"], on_demand["aside"]) == (400_000, 0)


def test_a_process_is_held_to_its_share_of_a_card_and_its_child_to_what_it_leaves() -> None:
    found = json.loads(card.run("tests.device.work", "shared", memory=1 << 20, QUANTMILL_CARD_SHARE="0.250000"))
    assert found["device"] == "cuda"
    assert found["too much"]["kind"] == "OutOfMemory", "256 KiB are its share, and 100 are taken"
    room = {name: int(bytes_) for name, bytes_ in found["room"].items()}
    assert room["here"] == (256 - 100) << 10
    assert room["beside"] == pytest.approx((256 - 100) << 10, abs=2)
    assert room["without a share left"] == 0


def test_inputs_in_half_precision_are_summed_in_float32_without_a_copy_of_them() -> None:
    found = json.loads(card.run("tests.device.work", "products"))
    for name, of in found.items():
        assert of["error"] < 1e-6, name
        assert of["count"] == 300
        assert of["dtypes"] == ["torch.float32"]
    # The inputs, their magnitudes, and float32 sums: without 200 x 1100 inputs in float32.
    halves, whole = (found[f"torch.{name}"]["peak"] for name in ("bfloat16", "float32"))
    assert halves < whole - 2 * 300 * 1100


def test_a_column_loop_on_a_kernel_takes_few_launches() -> None:
    """Launches depend on the number of inputs, not of outputs: they grow evenly to those of 4096 x 14336."""
    found = {int(width): facts for width, facts in json.loads(card.run("tests.device.work", "columns")).items()}
    for width, facts in found.items():
        assert facts["kernels"] == 4 * width // 256, "GPTQ's sweep and three of the refinement's, in blocks of 256"
        assert facts["waits"] <= 5
    first, second, third = (facts["launches"] for facts in found.values())
    growth = third - second
    assert abs(growth - (second - first)) <= 10
    assert first + (14336 // 1024 - 1) * growth <= 2_000


# Launches of a layer 256 wide under each of eight recipes, and of the forwards and the search for folds beside them: a
# tenth above the count when they were written.
LAYER = {
    "gptq-w4-g128": 2_050, "awq-w4-g128": 1_970, "fp8-dynamic": 95, "fp8-block": 100, "rtn-w4-g128": 120, "nvfp4": 950,
    "mxfp4": 560, "w8a8-int8": 230, "beside": 820,
}  # fmt: skip


def test_a_layer_under_eight_recipes_takes_few_launches_and_waits() -> None:
    found = json.loads(card.run("tests.device.work", "layer", "256"))
    assert {name for name, of in found.items() if of["launches"] > LAYER[name]} == set(), found
    assert sum(of["waits"] for of in found.values()) <= 50, found


@pytest.mark.night
@pytest.mark.timeout(1800)
def test_a_layer_of_an_8b_takes_few_launches_and_by_its_counts_at_most_twice_its_bound() -> None:
    """With a micro-batch of calibration at most 10,000 launches under eight recipes; each further one adds its own."""
    half, whole, more = bench_counts.measured()
    found = bench_counts.counted(half, whole, more)
    further = more["beside"]["launches"] - whole["beside"]["launches"]
    for recipes in (gpu_stack.ONE, gpu_stack.EIGHT):
        layer = bench_counts.summed(found, recipes)
        batches = bench_counts.SAMPLES * bench_counts.LENGTH // MICRO_BATCH_TOKENS
        print(recipes, layer, further)
        assert layer.bound <= layer.seconds <= 2 * layer.bound
        assert layer.waits <= 50
        assert layer.launches - (batches - 1) * further <= 10_000
        assert further <= 130


METHODS = (
    "gptq-w4-g128", "awq-w4-g128", "fp8-dynamic", "fp8-block", "rtn-w4-g128", "nvfp4", "mxfp4", "w8a8-int8",
    "hqq-w4-g64", "bnb-nf4", "bnb-int8",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hidden", [256, 512])
def test_a_pass_takes_no_more_memory_than_is_planned(hidden: int) -> None:
    """The context, a billion bytes of the plan, isn't counted: without it a plan that forgets something falls short."""
    found = json.loads(card.run("tests.device.work", "peaks", str(hidden), *METHODS, seconds=500))
    assert found.keys() == set(METHODS)
    for name, (peak, planned) in found.items():
        assert 0 < peak <= planned, (name, peak, planned)


def test_views_share_memory_and_inputs_in_place_keep_theirs(seen: dict[str, Any]) -> None:
    assert seen["shared"] == [[0.0, 0.0], [1.0, 1.0]]


# Launches of a search of one weight of 1024 x 1024, in one piece: the same up to 2^25 elements.
SEARCHES = {"hqq": 1_800, "mxfp4": 110, "nvfp4": 300, "mse": 380}


@pytest.fixture(scope="module")
def searched() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(card.run("tests.device.work", "searches"))
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_takes_few_launches_and_finds_what_it_finds_on_the_cpu(searched: dict[str, Any], name: str) -> None:
    assert searched[name]["same"]
    assert 0 < searched[name]["launches"] <= SEARCHES[name], searched
    assert searched[name]["waits"] <= 4, searched
