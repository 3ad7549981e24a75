"""Statistics of the layers' inputs, against plain hooks and hand-made routing."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.families import FAMILIES, save_random
from workers.checkpoint.source import Source
from workers.errors import NumericalError
from workers.model import statistics as engine
from workers.model.forward import stream
from workers.model.loading import InputName, StreamedModel
from workers.model.statistics import CopiedStatistics, InputStatistics, Observer


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (2, 16), generator=generator) for _ in range(3)]


def observed(folder: Path, observed_count: int = 2) -> dict[str, InputStatistics]:
    """Statistics by checkpoint key; only the first two batches count."""
    observer, found = Observer(), {}
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)

        def keep(layer: int) -> None:
            for weight in streamed.weights:
                statistics = observer.of(weight.input)
                if weight.layer == layer and statistics is not None:
                    found[weight.key] = statistics

        stream(streamed, batches(), observer=observer, observed=observed_count, after_layer=keep)
    return found


def captured(plain: Any, names: list[str], count: int = 2) -> dict[str, torch.Tensor]:
    """What plain hooks see at the named modules: [N, I]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
    with torch.inference_mode():
        for batch in batches()[:count]:
            plain(input_ids=batch, use_cache=False)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def assert_sums_of(statistics: InputStatistics, x_NI: torch.Tensor) -> None:
    assert statistics.count == len(x_NI)
    torch.testing.assert_close(statistics.gram_II, x_NI.T @ x_NI, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.abs_sum_I, x_NI.abs().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.abs_max_I, x_NI.abs().amax(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_sums_are_those_of_the_inputs(family: str, tmp_path: Path) -> None:
    plain = save_random(family, tmp_path)
    found = observed(tmp_path)
    prefix = "" if next(iter(found)) in plain.state_dict() else f"{plain.base_model_prefix}."
    names = [prefix + key.rpartition(".")[0] for key in found]
    for statistics, x_NI in zip(found.values(), captured(plain, names).values(), strict=True):
        assert_sums_of(statistics, x_NI)


def test_projections_of_one_input_share_their_statistics(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    found = observed(tmp_path)
    one = {key.removeprefix("model.layers.1."): value for key, value in found.items() if ".layers.1." in key}
    q, k, v = (one[f"self_attn.{name}_proj.weight"] for name in "qkv")
    assert q is k is v
    assert one["mlp.gate_proj.weight"] is one["mlp.up_proj.weight"]
    assert len({id(value) for value in one.values()}) == 4


def routed(plain: Any, experts: int) -> dict[tuple[int, int], torch.Tensor]:
    """The tokens [N, I] that come to each expert of each layer, by what plain hooks see at the experts' door."""
    seen: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    for number, layer in enumerate(plain.model.layers):

        def look(module: Any, inputs: Any, number: int = number) -> None:
            hidden_NI, chosen_NK = inputs[:2]
            for expert in range(experts):
                seen[number, expert].append(hidden_NI[(chosen_NK == expert).any(-1)])

        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(look)
    with torch.inference_mode():
        for batch in batches()[:2]:
            plain(input_ids=batch, use_cache=False)
    return {place: torch.cat(inputs) for place, inputs in seen.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_each_expert_counts_the_tokens_routed_to_it(family: str, tmp_path: Path) -> None:
    plain = save_random(family, tmp_path)
    found = observed(tmp_path)
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    looked_at = 0
    for (number, expert), x_NI in routed(plain, 4).items():
        one = {
            match.group(1): statistics
            for key, statistics in found.items()
            if (match := re.fullmatch(rf".*layers\.{number}\..*experts\.{expert}\.(\w+)\.weight", key))
        }
        if not len(x_NI):
            assert one == {}
            continue
        of_gate, of_up, of_down = (one[name] for name in names)
        assert of_gate is of_up
        assert_sums_of(of_gate, x_NI)
        experts = plain.model.layers[number].mlp.experts
        with torch.inference_mode():
            gate, up = (x_NI @ experts.gate_up_proj[expert].T).chunk(2, -1)
            inner_NI = experts.act_fn(gate) * up
        assert of_down.count == len(x_NI)
        torch.testing.assert_close(of_down.gram_II, inner_NI.T @ inner_NI, rtol=1e-5, atol=1e-5)
        looked_at += 1
    assert looked_at >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_is_seen(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    found = observed(tmp_path)
    with Source(tmp_path) as source:
        weights = StreamedModel(tmp_path, source, dtype=torch.float32).weights
    unseen = [weight.module for weight in weights if weight.key not in found and weight.input.expert is None]
    # Mamba multiplies with this one's weight itself, and never calls the module.
    assert all(module.endswith("mixer.dt_proj") for module in unseen)
    for weight in weights:
        if weight.key in found:
            assert found[weight.key].gram_II.shape == (weight.shape_OI[1],) * 2
            assert weight.input.expert is not None or found[weight.key].count == 64


def test_the_same_tokens_give_the_same_bits(tmp_path: Path) -> None:
    save_random("qwen3_moe", tmp_path)
    one, two = observed(tmp_path), observed(tmp_path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key].gram_II, two[key].gram_II) for key in one)


def test_unobserved_batches_leave_no_trace(tmp_path: Path) -> None:
    save_random("llama", tmp_path)
    one, two = observed(tmp_path, 1), observed(tmp_path, 2)
    assert {value.count for value in one.values()} == {32}
    assert {value.count for value in two.values()} == {64}


def test_broken_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_random("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    observer = Observer()
    with Source(tmp_path) as source:
        streamed = StreamedModel(tmp_path, source, dtype=torch.float32)
        with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.q_proj"):
            stream(streamed, batches(), observer=observer, observed=3, after_layer=observer.check)


def test_wide_sums_are_whole_once_they_are_complete() -> None:
    width = engine.WIDE + 6
    batches = [torch.randn(40, width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    found = InputStatistics.empty(width, "cpu")
    for batch in batches:
        found.add(batch)
    found.complete()
    together = torch.cat(batches)
    torch.testing.assert_close(found.gram_II, together.T @ together, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.gram_II, found.gram_II.T)
    torch.testing.assert_close(found.abs_sum_I, together.abs().sum(0))


def test_without_magnitudes_the_products_are_the_same() -> None:
    batch = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    both, alone = InputStatistics.empty(24, "cpu"), InputStatistics.empty(24, "cpu")
    both.add(batch)
    alone.add(batch, magnitudes=False)
    assert torch.equal(both.gram_II, alone.gram_II)
    assert bool(both.abs_max_I.all())
    assert not alone.abs_max_I.any()


def test_what_two_cards_gather_sums_to_what_one_gathers() -> None:
    """Experts may have tokens on one card alone, and enough of them only together."""
    generator = torch.Generator().manual_seed(7)
    first, second = InputName("q.weight", None), InputName("k.weight", None)
    experts = [InputName("experts.down", expert) for expert in range(4)]
    inputs = [first, second, *experts]

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(count, 8, generator=generator)

    # Of each card: the layer's input, and the tokens of each expert that has some.
    cards = [(tokens(9), {0: tokens(5), 1: tokens(2)}), (tokens(7), {1: tokens(3), 2: tokens(3)})]
    settings = Observer("routed", 4, magnitudes=True)

    def gathered(*of: tuple[torch.Tensor, dict[int, torch.Tensor]]) -> Observer:
        observer = settings.anew()
        with observer.gathering(inputs):
            for x_NI, routed_to in of:
                observer.take(first, x_NI)
                observer.share(second, first)
                for expert, y_NI in routed_to.items():
                    observer.take(experts[expert], y_NI)
        return observer

    one, several = gathered(*cards), gathered(cards[0])
    several.add(gathered(cards[1]), inputs, torch.device("cpu"))
    assert several.of(first) is several.of(second)
    assert several.tokens_of_experts() == one.tokens_of_experts() == [0, 3, 5, 5]
    assert [several.borrowed(name) for name in experts] == [None, None, 3, 0]
    for name in inputs:
        summed, whole = several.of(name), one.of(name)
        assert summed is not None
        assert whole is not None
        assert summed.count == whole.count
        assert torch.equal(summed.abs_max_I, whole.abs_max_I)
        torch.testing.assert_close(summed.gram_II, whole.gram_II)
        torch.testing.assert_close(summed.abs_sum_I, whole.abs_sum_I)


def test_copies_are_shared_as_what_they_are_copies_of() -> None:
    first, second, expert, other = InputName("q", None), InputName("k", None), InputName("e", 0), InputName("e", 1)
    observer = Observer("routed", 4)
    with observer.gathering([first, second, expert, other]):
        observer.take(first, torch.ones(5, 4))
        observer.share(second, first)
        observer.take(expert, torch.ones(2, 4))
    copied = CopiedStatistics(observer, torch.device("meta"))
    copies = [copied.of(name) for name in (first, second, expert, other)]
    assert all(copy is not None and copy.gram_II.device.type == "meta" for copy in copies)
    assert copies[0] is copies[1]
    assert copies[2] is copies[3], "both borrow those of all experts"
    assert [copied.borrowed(name) for name in (first, expert, other)] == [None, 2, 0]
    assert copied.of(InputName("v", None)) is None
