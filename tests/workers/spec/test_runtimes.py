"""Runtimes by name, what each of a recipe's checks came to, and what vLLM refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.zoo import outcomes, shipped
from pipeline.zoo.outcomes import Outcome
from tests.workers.jobs import recipe
from workers.machine import preflight
from workers.spec.formats import FORMATS
from workers.spec.job import LOADER_CHECKED, RuntimeAgreement, Verdict
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import RUNTIMES, VLLM, checkers, checking, runtime_named
from workers.spec.schemes import IntScheme

OLD = {
    "name": "transformers", "version": "5.23", "max_abs_logit_difference": 0.1, "relative_logit_difference": 0.01,
    "generated": "x", "host_bytes": 1,
}  # fmt: skip


@given(name=st.sampled_from(list(RUNTIMES)), shift=st.sampled_from([str.upper, str.lower, str.title]))
def test_a_runtime_is_found_in_whatever_case(name: str, shift: Any) -> None:
    assert runtime_named(shift(name)) is RUNTIMES[name]


def test_an_unknown_runtime_is_named_with_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"got 'vlm'; did you mean 'vLLM'\? Known are transformers, vLLM, llama\.cpp"):
        runtime_named("vlm")
    with pytest.raises(ValueError, match=r"got 'sglang'; Known are transformers"):
        runtime_named("sglang")


@given(fmt=st.sampled_from(list(FORMATS)), names=st.lists(st.sampled_from(list(RUNTIMES)), unique=True))
def test_named_runtimes_check_what_they_read_and_no_format_is_left_unchecked(fmt: str, names: list[str]) -> None:
    found = checkers(fmt, names)
    assert found
    assert all(fmt in row.rules and row.entry for row in found)
    reading = [name for name in names if fmt in RUNTIMES[name].rules]
    assert [row.name for row in found] == (reading or [checking(fmt).name])


def test_the_default_of_each_format_is_what_it_was() -> None:
    expected = {"gguf": "llama.cpp", "mlx": "mlx-lm"}
    assert {fmt: checking(fmt).name for fmt in FORMATS} == {fmt: expected.get(fmt, "transformers") for fmt in FORMATS}


def test_the_environments_of_named_runtimes_are_needed() -> None:
    chosen = shipped.recipe("gptq-w4-g128")
    assert preflight.environments_of(chosen) == []
    assert preflight.environments_of(chosen, ("transformers", "vLLM")) == ["vllm-cpu"]
    gguf = shipped.recipe("gguf-q4_0")
    assert preflight.environments_of(gguf, ("vLLM",)) == preflight.environments_of(gguf)


def test_packages_in_this_process_are_asked_of_runtimes_that_run_here(tmp_path: Any) -> None:
    facts = preflight.probe(tmp_path, with_devices=False)
    bare = facts.model_copy(update={"packages": {k: v for k, v in facts.packages.items() if k != "gptqmodel"}})
    chosen = recipe(name="w4", method="rtn", scheme={"bits": 4, "group_size": 128}, format="gptq")
    assert "gptqmodel" in preflight.problems(bare, chosen)[0]
    assert preflight.problems(bare, chosen, ("vLLM",)) == []


def test_older_manifests_keep_their_bytes_and_newer_ones_say_more() -> None:
    old = {"accepted": True, "reasons": [], "outcome": "ACCEPT", "runtime": OLD}
    read = Verdict.model_validate(old)
    dumped = read.model_dump(mode="json")
    assert dumped["runtime"] == OLD
    assert not {"codes", "other_runtimes"} & set(dumped)
    new = RuntimeAgreement(**OLD, kl_mean=0.5, processor="x86_64 with AVX2", verdict=LOADER_CHECKED, kernels="none")
    both = read.model_copy(update={"other_runtimes": (new,)})
    again = Verdict.model_validate_json(both.model_dump_json())
    assert again == both
    assert [runtime.said for runtime in again.runtimes] == [
        "transformers 5.23: checked",
        "transformers 5.23 on x86_64 with AVX2: loader checked, kernels not",
    ]


INT4 = {"bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("fmt", "scheme", "kinds", "said"),
    [
        ("compressed-tensors", INT4, LayerKinds(experts=True, mixture=True, mixed=True), None),
        ("compressed-tensors", INT4, LayerKinds(split=True), "have several schemes within what vLLM fuses"),
        ("compressed-tensors", {**INT4, "bits": 3}, LayerKinds(), "have 3 bits"),
        ("gptq", INT4, LayerKinds(), None),
        ("gptq", {**INT4, "symmetric": False}, LayerKinds(), "aren't symmetric integers"),
        ("gptq", INT4, LayerKinds(experts=True), "are experts"),
        ("mlx", INT4, LayerKinds(), "which vLLM doesn't read"),
    ],
)
def test_what_vllm_refuses(fmt: str, scheme: dict[str, Any], kinds: LayerKinds, said: str | None) -> None:
    why = VLLM.reads(fmt, IntScheme(**scheme), kinds)
    assert why is None if said is None else said in (why or "")


def test_outcomes_are_read_as_they_were_written_and_told_in_short(tmp_path: Any) -> None:
    found = [
        Outcome(recipe="a", model="tiny", runtime="vLLM", verdict="checked", version="1", processor="x", kl=1e-9),
        Outcome(recipe="a", model="mixture", runtime="vLLM", verdict="loader checked, kernels not", difference=0.001),
        Outcome(recipe="b", model="tiny", runtime="vLLM", verdict="refused", why="are odd"),
    ]
    outcomes.write(found, tmp_path)
    assert sorted(outcomes.read(tmp_path), key=str) == sorted(found, key=str)
    assert outcomes.in_short(found, "a", "vLLM") == "checked; mixtures: loader checked, kernels not"
    assert outcomes.in_short(found[1:], "a", "vLLM") == "loader checked, kernels not"
    assert outcomes.in_short(found, "b", "vLLM") == ""
    page = (tmp_path / "runtimes.md").read_text()
    assert "| a | vLLM 1, x | checked | | 1e-09 |" in page
    assert "| b | vLLM | refused: are odd | | |" in page
