"""Which nodes of a cluster a recipe runs on, and what the others lack."""

from __future__ import annotations

from pipeline.cli.machine import _state_on
from pipeline.fleet.feasibility import judged_by_node
from pipeline.zoo import shipped
from tests.workers.machine.test_preflight import facts


def test_nodes_are_told_apart_and_what_they_lack_is_told_together() -> None:
    whole = facts(node="big").packages
    bare = {name: version for name, version in whole.items() if name != "bitsandbytes"}
    probed = {
        "a" * 56: {None: facts(node="big")},
        "b" * 56: {None: facts(node="small", packages=bare)},
        "c" * 56: {None: facts(node="small", packages=bare)},
        "d" * 56: {None: "its Python doesn't start"},
    }
    chosen = [shipped.recipe(name) for name in ("bnb-nf4", "fp8-block", "gguf-q4_0")]
    found = judged_by_node(chosen, {node: {**one, "llama-cpp": "not built"} for node, one in probed.items()})
    small = ["small (bbbbbbbb)", "small (cccccccc)"]
    assert list(found["bnb-nf4"]) == ["big", *small]
    assert _state_on(found["fp8-block"]) == f"ready on big, {small[0]}, {small[1]}"
    said = _state_on(found["bnb-nf4"])
    assert said.startswith(f"ready on big; {small[0]}, {small[1]}: package bitsandbytes is not installed")
    assert _state_on(found["gguf-q4_0"]) == f"big, {small[0]}, {small[1]}: not built"
    assert _state_on({}) == "no node answers"
