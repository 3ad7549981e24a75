"""A whole pass on a card, for each method: right, and within budgets of launches, waits and bytes moved.

A budget is the count when it was written and a quarter more: whoever brings back a loop or a copy has to raise it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.device import card
from tests.workers.formats.test_gguf import with_llama_cpp

pytestmark = [pytest.mark.night, pytest.mark.timeout(900)]

# Bytes of llama-tiny's checkpoint, and of its layers.
MODEL_BYTES, LAYER_BYTES = 8_400_000, 6_200_000


class Budget(NamedTuple):
    """The most launches and waits of a pass, and of its verification."""

    launches: int
    waits: int
    verify: int
    verify_waits: int


# Bytes moved to the card as a multiple of the checkpoint's: each layer once, whatever the recipes, and what is outside.
MOVED = 1.1
BUDGETS = {
    "gptq-w4-g128": Budget(42_000, 230, 16_000, 380),
    "awq-w4-g128": Budget(42_000, 800, 16_000, 380),
    "fp8-dynamic": Budget(1_300, 230, 16_000, 380),
    "bnb-nf4": Budget(1_600, 380, 16_000, 650),
}
# Of a verification: the source's weights once, in float32 where scales are folded into them, the artifact's codes twice
# (to compare and to compute with), and twice what is outside of the layers.
VERIFIED = 4.0


@pytest.fixture(scope="module", params=BUDGETS)
def passed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A recipe, and the facts of its pass and its verification."""
    workspace = tmp_path_factory.mktemp("device")
    said = card.run("tests.device.work", "whole_pass", str(workspace), "llama-tiny", request.param, seconds=600)
    facts: dict[str, Any] = json.loads(said)
    return request.param, facts


def test_the_artifact_is_right_and_its_runtime_agrees_on_the_card(passed: tuple[str, dict[str, Any]]) -> None:
    name, facts = passed
    verified = facts["verify"][name]
    assert facts["quantize"]["failure"] is verified["failure"] is None
    runtime, metrics = verified["verdict"]["runtime"], verified["verdict"]["metrics"]
    assert runtime["processor"] == verified["environment"]["card"] == "Stand-in for a card"
    assert runtime["relative_logit_difference"] < 0.02
    assert metrics["kl_mean"] < 0.05
    # The held-out text is too short for some bounds; nothing else may be against it.
    assert set(verified["verdict"].get("codes", ())) <= {"perplexity"}


def test_it_computes_on_the_card_within_its_budgets(passed: tuple[str, dict[str, Any]]) -> None:
    name, facts = passed
    made, verified, budget = facts["quantize"], facts["verify"][name], BUDGETS[name]
    assert 100 < made["launches"] <= budget.launches
    assert made["waits"] <= budget.waits
    # 400 launches a weight, of which a diagnosis takes most, on 256 of its rows.
    assert 5_000 < verified["launches"] <= budget.verify
    assert verified["waits"] <= budget.verify_waits
    assert 2 * MODEL_BYTES < verified["to"] <= VERIFIED * MODEL_BYTES
    once(made)
    assert made["device"] == made["peak"] > 0


def once(made: dict[str, Any]) -> None:
    """Assert that layers went to the card once, from pinned memory, beside what was computed."""
    assert made["to"] <= MOVED * MODEL_BYTES
    assert made["aside"] >= LAYER_BYTES
    assert made["unrecorded"] == 0


def test_a_layer_goes_to_the_card_once_for_all_recipes(tmp_path: Path) -> None:
    recipes = (*BUDGETS, "rtn-w4-g128", "nvfp4", "w8a8-int8")
    said = json.loads(card.run("tests.device.work", "one_pass", str(tmp_path), "llama-tiny", *recipes))
    assert said["failure"] is None
    assert said["made"] == len(recipes)
    once(said)


@with_llama_cpp
def test_a_gguf_is_made_on_the_card(tmp_path: Path) -> None:
    said = json.loads(card.run("tests.device.work", "one_pass", str(tmp_path), "llama-tiny", "gguf-q4_k_m"))
    assert said["failure"] is None
    assert said["made"] == 1
    once(said)


FAULTS = {
    "illegal access": ("CUDA error: an illegal memory access was encountered", "DeviceLost"),
    "no memory for a library": (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "OutOfMemory",
    ),
    "another architecture": ("CUDA error: no kernel image is available for execution on the device", "DeviceUnusable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_the_card_is_the_stages_and_no_recipes(fault: str, tmp_path: Path) -> None:
    words, kind = FAULTS[fault]
    said = json.loads(card.run("tests.device.work", "faulty_pass", str(tmp_path), "400", words))
    assert said["failure"]["kind"] == kind, said
    assert words.rstrip(".") in said["failure"]["message"]


def test_out_of_memory_has_its_class_and_a_retry_with_room_succeeds(tmp_path: Path) -> None:
    said = json.loads(card.run("tests.device.work", "tight_pass", str(tmp_path), seconds=600))
    assert said["tight"]["failure"]["kind"] == "OutOfMemory", said
    assert said["tight"]["peak"] <= said["limit"]
    assert said["again"]["failure"] is None, said
    assert said["again"]["peak"] > said["limit"]


@pytest.mark.parametrize(("capability", "says"), [((9, 0), "package kernels"), ((8, 6), "capability 8.6")])
def test_fp8_in_blocks_is_verified_where_transformers_has_no_kernels(
    capability: tuple[int, int], says: str, tmp_path: Path
) -> None:
    """transformers decodes it on loading there, so the activations aren't rounded: neither by it nor by us."""
    said = card.run("tests.device.work", "whole_pass", str(tmp_path), "llama-tiny", "fp8-block", capability=capability)
    verdict = json.loads(said)["verify"]["fp8-block"]["verdict"]
    assert verdict["runtime"] is not None, verdict
    assert says in verdict["runtime"]["kernels"]
    assert verdict["runtime"]["relative_logit_difference"] < 1e-3
