"""The first five minutes: a run without a zoo file, and a first zoo file that is asked for or given by options."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning import choosing
from pipeline.zoo import drafts, shipped, zoo
from tests.pipeline.cli.terminal import answered, quantmill
from tests.pipeline.runs import MODELS, TEXT
from workers.errors import ZooError
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import RUNTIMES

LLAMA = str(MODELS / "llama-tiny")


@pytest.mark.slow
def test_quantize_is_the_run_of_the_zoo_that_it_saves(tmp_path: Path) -> None:
    short = tmp_path / "text.txt"
    short.write_text((TEXT / "calibration.txt").read_text()[:300_000])
    done = quantmill(
        "quantize", LLAMA, "--recipe", "rtn-w4-g128", "--to", "acme", "--endpoint", "loopback",
        "--calibration", "text.txt", "--save-zoo", "kept/zoo.yaml", "--out", "made",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    results = json.loads(Path(lines[-2]).read_text())
    assert results["artifacts"][0]["status"] == "published"
    assert results["artifacts"][0]["repo_id"] == "acme/llama-tiny-rtn-w4-g128"
    # The zoo that was kept asks for the very same: nothing is left to be made.
    again = quantmill("plan", "kept/zoo.yaml", "--out", "made", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "1 artifacts, 0 to make" in again.stdout
    answer = quantmill("plan", "kept/zoo.yaml", "--out", "made", "--json", cwd=tmp_path)
    (cell,) = json.loads(answer.stdout)["artifacts"]
    assert (cell["recipe"], cell["plan"]) == ("rtn-w4-g128", "published already")
    whole = quantmill("run", "kept/zoo.yaml", "--out", "made", "--json", cwd=tmp_path)
    assert json.loads(whole.stdout)["artifacts"][0]["status"] == "skipped"
    quiet = quantmill("run", "kept/zoo.yaml", "--out", "made", "--quiet", cwd=tmp_path)
    assert [Path(line).name for line in quiet.stdout.splitlines()] == ["results.json", "report.html"]
    runs = json.loads(quantmill("status", "--out", "made", "--json", cwd=tmp_path).stdout)
    assert [row["status"] for row in runs] == ["ok", "ok", "ok"]
    stages = json.loads(quantmill("status", runs[-1]["run_id"], "--out", "made", "--json", cwd=tmp_path).stdout)
    assert [row["stage"] for row in stages] == ["fetch", "quantize", "verify", "publish"]
    wrong = quantmill("status", f"{runs[-1]['run_id']}x", "--out", "made", cwd=tmp_path)
    assert f"did you mean {runs[-1]['run_id']!r}?" in wrong.stderr


def test_quantize_takes_the_projects_own_text_and_says_so(tmp_path: Path) -> None:
    planned = quantmill("quantize", LLAMA, "--recipe", "gptq-w4-g128", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "name text of your own by --calibration and --held-out" in planned.stdout
    assert "1 artifacts, 1 to make" in planned.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([LLAMA], "recipes: none named; name one by --recipe NAME"),
        ([LLAMA, "--recipe", "gptq-w4-g12"], "did you mean 'gptq-w4-g128'?"),
        ([LLAMA, "--recipe", "bnb-nf4", "--endpoint", "loopback"], "--endpoint: got 'loopback' without --to"),
        (
            [LLAMA, "--recipe", "gptq-w4-g128", "--calibration", "gone.txt"],
            "--calibration: no such file, got 'gone.txt'",
        ),
        (
            [LLAMA, "--recipe", "gptq-w4-g128", "--held-out", "zoo.bin"],
            "'zoo.bin' isn't known by its suffix",
        ),
        (["./gone", "--recipe", "bnb-nf4", "--dry-run"], "models: no such folder, got './gone'"),
    ],
)
def test_wrong_options_of_quantize(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.bin").write_text("text")
    done = quantmill("quantize", *arguments, cwd=tmp_path)
    assert done.returncode == (1 if said.startswith("models") else 2)
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_init_takes_options_and_what_it_writes_is_planned(tmp_path: Path) -> None:
    done = quantmill("init", "zoos/mine.yaml", "--model", LLAMA, "--memory", "16GiB", "--to", "me", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "zoos/mine.yaml").read_text()
    assert text.startswith(f"# yaml-language-server: $schema={drafts.SCHEMA}\n")
    assert json.loads((tmp_path / "zoos" / drafts.SCHEMA).read_text())["properties"]["models"]
    assert zoo.load(tmp_path / "zoos/mine.yaml").publish.namespace == "me"  # type: ignore[union-attr]
    (tmp_path / "here.yaml").write_text(
        text.replace("publish:", "publish: &p").replace("{namespace: me", "{endpoint: loopback, namespace: me")
    )
    planned = quantmill("plan", "here.yaml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "2 artifacts, 2 to make" in planned.stdout


def test_init_asks_in_a_terminal(tmp_path: Path) -> None:
    answers = [
        ("Models", LLAMA), ("will load", "vLLM"), ("Memory", "16GiB"), ("What for", "production"),
        ("Recipes", ""), ("account", "me"), ("Where", "loopback"),
    ]  # fmt: skip
    printed = answered(["init"], answers, tmp_path)
    assert "wrote zoo.yaml" in printed
    made = zoo.load(tmp_path / "zoo.yaml")
    assert [model.id for model in made.models] == [LLAMA]
    assert made.verify.runtimes == ("vLLM",)
    assert made.publish
    assert (made.publish.namespace, made.publish.endpoint) == ("me", "loopback")
    assert made.recipes == ("gptq-w8-g128", "bnb-int8"), "eight bits, which vLLM reads"


def test_init_never_writes_what_it_would_refuse(tmp_path: Path) -> None:
    for arguments, said in (
        (["--memory", "lots"], "--memory: got 'lots', expected a size"),
        (["--runtime", "llamacpp"], "did you mean 'llama.cpp'?"),
        (["--recipe", "nf4"], "unknown recipe, got 'nf4'"),
        (["--model", LLAMA, "--memory", "1MiB"], "--memory: got '1MiB', but the smallest artifact"),
    ):
        done = quantmill("init", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", [row.name for row in RUNTIMES.values() if row.entry])
def test_the_usual_recipes_are_read_by_their_runtime(runtime: str) -> None:
    for name in drafts.usual(runtime):
        recipe = shipped.recipe(name)
        assert RUNTIMES[runtime].reads(recipe.format, recipe.scheme, LayerKinds()) is None


@given(
    models=st.lists(
        st.from_regex(r"[A-Za-z0-9][\w.-]{0,20}/[A-Za-z0-9][\w.: #'\"-]{0,20}", fullmatch=True), min_size=1, max_size=3
    ),
    namespace=st.none() | st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True),
    recipes=st.lists(st.sampled_from(shipped.recipe_names()), min_size=1, max_size=4),
)
def test_every_draft_is_a_zoo_that_says_what_was_asked(
    models: list[str], namespace: str | None, recipes: list[str]
) -> None:
    draft = drafts.Draft(
        models=models, recipes=recipes, namespace=namespace, endpoint="loopback" if namespace else None
    )
    made = drafts.loaded(draft, "draft")
    assert [model.id for model in made.models] == list(dict.fromkeys(models))
    assert list(made.recipes) == list(dict.fromkeys(recipes))
    assert (made.publish.namespace if made.publish else None) == namespace


@given(st.integers(1, 4096), st.sampled_from(["MiB", "GiB", "TiB", "mib", "M", "G"]))
def test_memory_in_words(count: int, unit: str) -> None:
    power = {"m": 2, "g": 3, "t": 4}[unit[0].lower()]
    bytes_ = count * (1024 if "i" in unit.lower() else 1000) ** power
    if bytes_ >= 2**20:
        assert choosing.memory_bytes(f"{count} {unit}") == bytes_
    else:
        with pytest.raises(ZooError):
            choosing.memory_bytes(f"{count} {unit}")


def test_paths_of_a_draft_lead_to_the_same_files(tmp_path: Path) -> None:
    draft = drafts.Draft(models=[os.path.relpath(LLAMA)], recipes=["bnb-nf4"], here=Path.cwd())
    drafts.save(draft, tmp_path / "deep" / "zoo.yaml")
    made = zoo.load(tmp_path / "deep" / "zoo.yaml")
    assert (tmp_path / "deep" / made.models[0].id).resolve() == Path(LLAMA).resolve()
