"""A pass on several cards of one process: its artifacts, who computed them, and what breaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.device import card
from tests.workers.jobs import ZOO
from workers.checkpoint.source import Source
from workers.formats.decoded import open_decoded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of so many bytes a card's share for a micro-batch holds some of the sequences, and a layer is brought to it whole.
MEMORY = 120_000_000
UNCALIBRATED = ("rtn-w4-g128", "bnb-nf4", "fp8-dynamic")
# As many as there are cards, and fewer: then a layer's problems are divided.
RECIPES = {
    "llama-tiny": ("gptq-w4-g128", "awq-w4-g128", *UNCALIBRATED),
    "qwen3-moe-tiny": ("gptq-w4-g128", "rtn-w4-g128"),
}
ONE = ("gptq-w4-g128",)

Made = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A pass of a model under recipes on so many cards; ``again``: not the one that was made already."""

    @cache
    def run(model: str, recipes: tuple[str, ...], cards: int, again: bool = False) -> dict[str, Any]:
        workspace = str(tmp_path_factory.mktemp("cards"))
        said = json.loads(
            card.run("tests.device.work", "card_pass", workspace, model, *recipes, cards=cards, memory=MEMORY)
        )
        assert said["failure"] is None
        assert not said["errors"]
        return said  # type: ignore[no-any-return]

    return run


def weights(folder: str) -> dict[str, Tensor]:
    with open_decoded(Path(folder)) as opened:
        return {key: opened.read(key).float() for key in opened.headers}


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("cards", [2, 3])
def test_without_calibration_the_bytes_are_those_of_one_card(made: Made, model: str, cards: int) -> None:
    one, several = (made(model, RECIPES[model], count)["digests"] for count in (1, cards))
    names = [name for name in RECIPES[model] if name in UNCALIBRATED]
    assert names
    assert [several[name] for name in names] == [one[name] for name in names]


@pytest.mark.parametrize("model", RECIPES)
def test_the_same_number_of_cards_makes_the_same_bytes(made: Made, model: str) -> None:
    first, second = made(model, RECIPES[model], 2), made(model, RECIPES[model], 2, again=True)
    assert first["digests"] == second["digests"]


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("cards", [2, 3])
def test_who_solves_what_is_not_in_the_bytes(made: Made, model: str, cards: int) -> None:
    """Alone a recipe's problems are divided among all cards; beside others it has one card."""
    alone, beside = (made(model, recipes, cards)["digests"]["gptq-w4-g128"] for recipes in (ONE, RECIPES[model]))
    assert alone == beside


def distances(model: str, one: str, several: str) -> Iterator[tuple[float, float]]:
    """Of each quantized weight of two artifacts: how far they are apart, as a share of the weight, and the second's
    squared error as a multiple of the first's."""
    first, second = weights(one), weights(several)
    with Source(ZOO / "models" / model) as source:
        for key in (key for key in source.headers if key.endswith("proj.weight")):
            plain = source.read(key).float()
            apart = (first[key] - second[key]).norm() / first[key].norm()
            yield float(apart), float((second[key] - plain).norm() / (first[key] - plain).norm()) ** 2


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("cards", [2, 3])
def test_sums_in_another_order_change_codes_that_are_nearly_tied(made: Made, model: str, cards: int) -> None:
    one, several = made(model, ONE, 1), made(model, ONE, cards)
    assert one["digests"] != several["digests"], "statistics are summed by card"
    apart, errors = zip(*distances(model, *(of["folders"]["gptq-w4-g128"] for of in (one, several))), strict=True)
    assert max(apart) < 0.05
    assert all(error == pytest.approx(1, abs=0.01) for error in errors)


def test_a_search_that_takes_another_exponent_finds_one_as_good(made: Made) -> None:
    """AWQ's weights are apart where the exponent is another, and their error changes there; in sum it doesn't."""
    folders = (made("llama-tiny", RECIPES["llama-tiny"], count)["folders"]["awq-w4-g128"] for count in (1, 2))
    apart, errors = zip(*distances("llama-tiny", *folders), strict=True)
    assert max(apart) < 0.15
    assert sum(errors) / len(errors) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("cards", [2, 3])
def test_all_cards_compute(made: Made, model: str, cards: int) -> None:
    """Of one recipe each card has a share of the text and of the problems; a layer is read once and is on each."""
    alone, one = made(model, ONE, cards), made(model, ONE, 1)
    launches, peaks = zip(*alone["by_card"], strict=True)
    assert min(launches) > 0.5 * sum(launches) / cards
    assert sum(launches) < 1.2 * one["launches"]
    assert alone["aside"] == cards * one["aside"]
    assert min(peaks) > 0.4 * one["peak"]
    assert max(peaks) <= 1.1 * one["peak"]
    assert alone["device"] == max(peaks), "the peak that is told is the highest"
    assert alone["unrecorded"] == 0
    assert {of["cards"] for of in alone["made_with"]} == {str(cards)}
    assert "cards" not in one["made_with"][0]


@pytest.mark.parametrize("model", RECIPES)
def test_a_recipe_on_its_own_quantized_activations(made: Made, model: str) -> None:
    """Each layer goes on from the last one's codes: what differs there changes what comes after."""
    one, several = (made(model, ("own", "rtn-w4-g128"), count) for count in (1, 2))
    assert several["digests"]["rtn-w4-g128"] == one["digests"]["rtn-w4-g128"]
    apart, errors = zip(*distances(model, one["folders"]["own"], several["folders"]["own"]), strict=True)
    assert max(apart) < 0.2
    assert all(error == pytest.approx(1, abs=0.05) for error in errors)


@pytest.mark.parametrize("cards", [2, 3])
def test_a_recipe_that_fails_fails_alone(made: Made, cards: int, tmp_path: Path) -> None:
    names = ("rtn-w4-g128", "gptq-w4-g128", "fp8-dynamic")
    command = ("failing_recipe", str(tmp_path), "llama-tiny", "rtn", *names)
    said = json.loads(card.run("tests.device.work", *command, cards=cards, memory=MEMORY))
    assert said["failure"] is None
    assert said["errors"] == {"rtn-w4-g128": "planted"}
    whole = made("llama-tiny", RECIPES["llama-tiny"], cards)["digests"]
    assert said["digests"] == {name: whole[name] for name in names[1:]}


def test_an_error_of_one_of_the_cards_that_solve_a_layer_is_the_recipes(tmp_path: Path) -> None:
    command = ("failing_recipe", str(tmp_path), "llama-tiny", "gptq", *ONE)
    said = json.loads(card.run("tests.device.work", *command, cards=2, memory=MEMORY))
    assert said["failure"] is None
    assert said["errors"] == {"gptq-w4-g128": "planted"}


def test_a_pass_is_taken_up_at_its_last_checkpoint_with_the_same_bytes(made: Made, tmp_path: Path) -> None:
    names = ("gptq-w4-g128", "rtn-w4-g128")
    said = json.loads(
        card.run("tests.device.work", "resumed_pass", str(tmp_path), "qwen3-moe-tiny", *names, cards=2, memory=MEMORY)
    )
    assert "planted" in said["first"]["failure"]["message"]
    assert said["again"]["failure"] is None
    assert said["layers"] == [0, 2]
    assert said["again"]["digests"] == made("qwen3-moe-tiny", names, 2)["digests"]


def test_a_lost_card_is_the_stages_error(tmp_path: Path) -> None:
    words = "CUDA error: an illegal memory access was encountered"
    said = json.loads(card.run("tests.device.work", "faulty_pass", str(tmp_path), "400", words, cards=2))
    assert said["failure"]["kind"] == "DeviceLost"


def test_out_of_memory_on_several_cards_has_its_class_and_a_retry_with_room_succeeds(tmp_path: Path) -> None:
    said = json.loads(card.run("tests.device.work", "tight_pass", str(tmp_path), cards=2))
    assert said["tight"]["failure"]["kind"] == "OutOfMemory", said
    assert said["again"]["failure"] is None, said


def test_a_share_of_a_card_is_of_one(tmp_path: Path) -> None:
    said = json.loads(
        card.run("tests.device.work", "one_pass", str(tmp_path), "llama-tiny", "rtn-w4-g128", cards=2,
                 QUANTMILL_CARD_SHARE="0.500000")
    )  # fmt: skip
    assert said["made"] == 1
    assert said["by_card"][1] == [0, 0]


def test_an_artifact_that_no_card_holds_is_loaded_over_two(tmp_path: Path) -> None:
    """compressed-tensors, which decodes it itself, and bitsandbytes; as on one card, up to nothing."""
    names = ("gptq-w4-g128", "bnb-nf4")
    said = json.loads(card.run("tests.device.work", "large_verify", str(tmp_path), *names, cards=2, memory=4 << 30))
    for name in names:
        runtime = said["verify"][name]["verdict"]["runtime"]
        assert runtime["processor"] == "2 x Stand-in for a card"
        assert runtime["relative_logit_difference"] < 1e-3


def test_an_artifact_that_not_even_all_cards_hold_is_loaded_on_the_cpu(tmp_path: Path) -> None:
    said = json.loads(card.run("tests.device.work", "large_verify", str(tmp_path), "bnb-nf4", memory=4 << 30))
    runtime = said["verify"]["bnb-nf4"]["verdict"]["runtime"]
    assert "card" not in runtime["processor"]
    assert runtime["relative_logit_difference"] < 0.1
