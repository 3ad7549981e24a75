"""The recipes that there are, and which to choose."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.main import main
from pipeline.cli.options import that_fit
from pipeline.planning import catalog, choosing
from pipeline.zoo import shipped
from tests.pipeline.cli.terminal import answered, quantmill
from tests.pipeline.runs import MODELS
from workers.spec import cards

LLAMA = str(MODELS / "llama-tiny")


def test_every_shipped_recipe_is_listed_with_what_it_takes(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(quantmill("recipes", "--json", cwd=tmp_path).stdout)}
    assert list(rows) == shipped.recipe_names()
    four = rows["gptq-w4-g128"]
    # 4 bits, 16 of a scale for 128 weights.
    assert four["bits"] == round(4 + 16 / 128, 2) or four["bits"] == 4.13
    assert four["runtimes"] == ["transformers", "vLLM"]
    assert four["calibrated"]
    assert not rows["bnb-nf4"]["calibrated"]
    assert "environment llama-cpp" in rows["gguf-q4_k_m"]["needs"]
    assert rows["keep-mlx"]["bits"] is None
    table = quantmill("recipes", cwd=tmp_path).stdout.splitlines()
    assert len(table) == 2 + len(rows)
    assert table[0].split()[-1] == "format"


def test_what_was_measured_is_of_shipped_recipes() -> None:
    rows = catalog.read()
    assert {row.recipe for row in rows} <= set(shipped.recipe_names())
    by_name = {row.recipe: row for row in rows if row.model == "llama-tiny"}
    assert by_name["gptq-w8-g128"].kl_mean < by_name["gptq-w4-g128"].kl_mean < by_name["rtn-w4-g128"].kl_mean


def test_recommend_says_which_and_whether_it_was_measured(tmp_path: Path) -> None:
    by_rule = json.loads(quantmill("recommend", LLAMA, "--memory", "16GiB", "--json", cwd=tmp_path).stdout)
    assert by_rule[0]["fits"]
    assert {one["source"] for one in by_rule} == {"rule"}
    # A run's results of this very model replace its rule, and what the others are expected to lose goes with them.
    results = {
        "run_id": "a", "artifacts": [
            {"model": LLAMA, "recipe": "gptq-w3-g128", "bytes": 9, "metrics": {"kl_mean": 0.0102, "top1_agreement": 1}},
            {"model": "another", "recipe": "bnb-nf4", "bytes": 9, "metrics": {"kl_mean": 1e-12, "top1_agreement": 1.0}},
            {"model": LLAMA, "recipe": "bnb-fp4", "bytes": 9, "metrics": None},
        ],
    }  # fmt: skip
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/results.json").write_text(json.dumps(results))
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/results.json").write_text("[]")
    assert list(choosing.measured_of(LLAMA, [tmp_path / "runs"])) == ["gptq-w3-g128"]
    found = json.loads(quantmill("recommend", LLAMA, "--memory", "16GiB", "--json", cwd=tmp_path).stdout)
    now, before = ({one["recipe"]: one for one in listed} for listed in (found, by_rule))
    assert (now["gptq-w3-g128"]["source"], now["gptq-w3-g128"]["kl_mean"]) == ("measured", 0.0102)
    assert now["bnb-nf4"]["source"] == "rule"
    assert now["bnb-nf4"]["kl_mean"] == pytest.approx(before["bnb-nf4"]["kl_mean"] / 10)


def test_recommend_uses_the_models_own_size_and_layers(tmp_path: Path) -> None:
    source = choosing.source(str(MODELS / "gpt2-tiny"), tmp_path)
    found = choosing.choose(source, None, None, "inference", {})
    assert {one.recipe for one in found} >= {"bnb-nf4"}
    assert "gptq-w4-g128" not in {one.recipe for one in found}, "Conv1D layers, which the plan would refuse"
    qlora = quantmill("recommend", LLAMA, "--use", "qlora", cwd=tmp_path)
    assert "make the first: quantmill quantize" in qlora.stdout
    assert qlora.stdout.splitlines()[1].startswith("bnb-nf4")


def test_wrong_questions_are_answered_by_a_remedy(tmp_path: Path) -> None:
    for arguments, said in (
        ([LLAMA, "--runtime", "vlmm"], "--runtime: unknown runtime, got 'vlmm'; did you mean 'vLLM'?"),
        ([LLAMA, "--use", "qlora", "--runtime", "mlx-lm"], "--use: no shipped recipe serves 'qlora'"),
        ([LLAMA, "--memory", "16 elephants"], "--memory: got '16 elephants', expected a size"),
        (["./gone"], "no such folder, got './gone'"),
    ):
        done = quantmill("recommend", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert said in done.stderr
    assert "nothing fits 1MiB" in quantmill("recommend", LLAMA, "--memory", "1MiB", cwd=tmp_path).stdout


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_narrow_terminal_has_fewer_columns_and_whole_names(columns: int, tmp_path: Path) -> None:
    printed = re.sub(r"\x1b\[[0-9;]*m", "", answered(["recipes"], [], tmp_path, columns=columns))
    lines = printed.replace("\r", "").splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(shipped.recipe_names())]] == shipped.recipe_names()
    assert max(map(len, lines[: 1 + len(shipped.recipe_names())])) <= columns
    assert ("format" in lines[0]) == (columns == 140)


@given(widths=st.lists(st.integers(1, 30), min_size=2, max_size=6), width=st.integers(20, 120), rows=st.integers(0, 3))
def test_columns_are_dropped_only_where_they_do_not_fit(widths: list[int], width: int, rows: int) -> None:
    columns = tuple(str(number) for number in range(len(widths)))
    table = [{column: "x" * wide for column, wide in zip(columns, widths, strict=True)} for _ in range(rows)]
    drop = columns[:0:-1]
    shown = that_fit(table, columns, drop, width)
    taken = [max(1, wide * bool(rows)) for wide in widths]
    total = sum(taken[: len(shown)]) + 2 * (len(shown) - 1)
    assert shown == list(columns[: len(shown)])
    assert total <= width or len(shown) == 1
    if len(shown) < len(columns):
        assert total + 2 + taken[len(shown)] > width


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("v100", set(), {"w8a8-int8", "fp8-dynamic", "fp8-block", "nvfp4-w4a4", "mxfp8"}),
        ("NVIDIA A100-80", {"w8a8-int8", "gptq-w4-g128", "nvfp4"}, {"fp8-dynamic", "nvfp4-w4a4", "mlx-w4-g64"}),
        ("geforce rtx4090", {"fp8-dynamic", "gguf-q4_k_m"}, {"nvfp4-w4a4", "mxfp8"}),
        ("B200", {"fp8-dynamic", "nvfp4-w4a4", "mxfp8"}, {"mlx-mxfp4"}),
    ],
)
def test_a_card_has_the_arithmetic_of_its_kind(name: str, has: set[str], lacks: set[str]) -> None:
    card = cards.card_named(name)
    assert all(cards.lacks(card, shipped.recipe(recipe)) is None for recipe in has)
    assert all(card.name in (cards.lacks(card, shipped.recipe(recipe)) or "") for recipe in lacks)


def test_a_card_stands_for_its_memory(tmp_path: Path) -> None:
    asked = ["recommend", str(MODELS / "llama-tiny"), "--json", "--all", "--out", str(tmp_path)]
    found = {one["recipe"] for one in json.loads(CliRunner().invoke(main, [*asked, "--gpu", "T4"]).output)}
    assert "gptq-w4-g128" in found
    assert not found & {"fp8-dynamic", "mlx-w4-g64", "nvfp4-w4a4"}
    said = CliRunner().invoke(main, [*asked, "--gpu", "H10"])
    assert said.exit_code == 2
    assert "did you mean 'H100'? known are V100" in said.output
