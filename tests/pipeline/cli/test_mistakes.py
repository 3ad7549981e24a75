"""Mistakes made on purpose: each message names the thing, the value that was given, and the remedy."""

import errno
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.main import main
from pipeline.zoo import zoo as zoos
from tests.pipeline.runs import MODELS
from workers.errors import DiskFull, ZooError
from workers.machine.failures import classify
from workers.spec.base import meant

GOOD = """\
name: small
models: [{id: MODEL}]
recipes: [gptq-w4-g128, bnb-nf4]
calibration: {dataset: {path: text, data_files: [a.txt]}}
verify: {dataset: {path: text, data_files: [b.txt]}, tokens: 4096}
""".replace("MODEL", str(MODELS / "llama-tiny"))
# What no message may show: names of classes, and what pydantic, yaml or Python say to programmers.
INTERNAL = re.compile(
    r"Traceback|pydantic|Input should|instance of|class '|Error:|ModelEntry|tuple|NoneType|<unicode string>|dict"
)

# What is changed in the good zoo file, and the thing, the value and the remedy that the message names.
ZOOS = [
    ("name: small", "name: small\nmodle: []", "modle", "got 'modle'", "did you mean 'models'?"),
    ("[{id:", "[{ident:", "models.0.id", "required", "add it"),
    ("[{id: ", "[{id: x/y, revison: ", "models.0.revison", "got 'revison'", "did you mean 'revision'?"),
    ("gptq-w4-g128,", "gptq-w4-g12,", "recipes", "got 'gptq-w4-g12'", "did you mean 'gptq-w4-g128'?"),
    ("bnb-nf4]", "7]", "recipes.1", "got 7", "write it as {"),
    (
        "bnb-nf4]", "{name: x, method: gtpq, scheme: {bits: 4}, format: gptq}]",
        "recipes.1: method", "got 'gtpq'", "did you mean 'gptq'?",
    ),
    (
        "bnb-nf4]", "{name: x, method: [rtn], scheme: {bits: 4}, format: gptq}]",
        "recipes.1: method", "['rtn']", "did you mean 'rtn'?",
    ),
    (
        "bnb-nf4]", "{name: x, method: rtn, scheme: {bits: 4}, format: gtpq}]",
        "recipes.1.format", "got 'gtpq'", "did you mean 'gptq'?",
    ),
    (
        "bnb-nf4]", "{name: x, method: gptq, scheme: {bits: 4}, format: gptq, options: {scales: mes}}]",
        "recipes.1.options.scales", "got 'mes'", "did you mean 'mse'?",
    ),
    ("tokens: 4096", "tokens: many", "verify.tokens", "got 'many'", "write one, as 128"),
    ("tokens: 4096", "tokens: 10", "verify.tokens", "got 10", "expected at least 256"),
    ("tokens: 4096", "tokens: 300", "verify: tokens", "got 300", "raise tokens, or lower sequence_length"),
    ("[b.txt]", "b.txt", "verify.dataset.data_files", "got 'b.txt'", "write it as [a, b]"),
    ("[b.txt]", "[a.txt]", "verify.dataset", "the calibration data", "text that was not calibrated on"),
    ("tokens: 4096", "gates: strict", "verify.gates", "got 'strict'", "name one"),
    ("tokens: 4096", "gates: {nf5: {kl_mean: 1}}", "verify.gates", "'nf5'", "did you mean 'nf4'?"),
    ("tokens: 4096", "gates: {w4: 3}", "verify.gates.w4", "got 3", "write it as {"),
    ("tokens: 4096", "runtimes: [vlmm]", "verify.runtimes", "got 'vlmm'", "did you mean 'vLLM'?"),
    ("name: small", "name: My Zoo", "name", "got 'My Zoo'", "lower case letters"),
    ("name: small", "name: a: b", "line 1", "got 'name: a: b'", "in quotes"),
    ("verify:", "publish:\n\tnamespace: a\nverify:", "line 6", "a tab", "replace the tab by spaces"),
    ("name: small", "name: small\nname: again", "line 1", "key 'name' is given twice", "keep one of them"),
    ("name: small", "name: {", "line 3", "got 'recipes: [gptq", "close the bracket"),
    ("verify:", "publish: acme\nverify:", "publish", "got 'acme'", "write it as {namespace: ...}"),
    ("verify:", "publish: {namespace: a b}\nverify:", "publish.namespace", "got 'a b'", "letters, digits"),
    ("verify:", "publish: {namespace: a, gated: yes}\nverify:", "publish.gated", "got True", "auto or manual"),
    ("verify:", "publish: {namespace: a, endpoint: runs/x}\nverify:", "publish.endpoint", "got 'runs/x'", "file:///"),
    ("{id: MODEL}".replace("MODEL", str(MODELS / "llama-tiny")), "org/name", "models.0", "got 'org/name'", "{id: ...}"),
    ("calibration:", "calibration: 3\nx_calibration:", "calibration", "got 3", "write it as {dataset: ...}"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "thing", "value", "remedy"), ZOOS)
def test_a_mistake_in_a_zoo(old: str, new: str, thing: str, value: str, remedy: str, tmp_path: Path) -> None:
    assert old in GOOD
    path = tmp_path / "zoo.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    done = CliRunner().invoke(main, ["plan", str(path), "--out", str(tmp_path / "runs")])
    assert done.exit_code == 2, done.output
    for words in (thing, value, remedy):
        assert words in done.output, done.output
    assert not INTERNAL.search(done.output.replace(str(path), "")), done.output


# A command line, and the thing, the value and the remedy.
COMMANDS = [
    (["paln", "zoo.yaml"], "command", "'paln'", "Did you mean 'plan'?"),
    (["plan", "zoo.yml"], "zoo file", "got 'zoo.yml'", "quantmill init"),
    (["plan", "zoo.yaml"], "calibration.dataset", "got 'a.txt'", "relative to the zoo file"),
    (["plan", "zoo.yaml", "--stict"], "option", "'--stict'", "Did you mean '--strict'?"),
    (["quantize", str(MODELS / "llama-tiny"), "--recipe", "nf4"], "recipes", "got 'nf4'", "Name one of them"),
    (["recommend", str(MODELS / "llama-tiny"), "--memory", "big"], "--memory", "got 'big'", "16GiB"),
    (["recommend", str(MODELS / "llama-tiny"), "--runtime", "mlx"], "--runtime", "got 'mlx'", "did you mean 'mlx-lm'?"),
    (["doctor", "gptq-w5-g128"], "recipes", "got 'gptq-w5-g128'", "did you mean 'gptq-w"),
    (["env", "create", "lama-cpp"], "env", "got 'lama-cpp'", "did you mean 'llama-cpp'?"),
    (["env", "creat", "x"], "command", "'creat'", "Did you mean 'create'?"),
    (["status"], "--out", "'runs'", "run a zoo first"),
    (["report", "x"], "--out", "run 'x'", "quantmill status"),
    (["verify", ".", "--reference", "x", "--text", "gone.txt"], "--text", "gone.txt", "does not exist"),
]


@pytest.mark.parametrize(("arguments", "thing", "value", "remedy"), COMMANDS)
def test_a_mistake_on_the_command_line(
    arguments: list[str], thing: str, value: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.yaml").write_text(GOOD)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    for words in (thing, value, remedy):
        assert words.lower() in done.output.lower(), done.output
    assert "Traceback" not in done.output
    assert not re.search(r"\w(Error|Exception|Found)\b", done.output.removeprefix("Error")), done.output


def test_a_fault_that_is_not_expected_is_one_line_unless_its_traceback_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").mkdir()
    (tmp_path / "runs" / "x" / "results.json").write_text("not JSON")
    arguments = ["report", "x", "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert "`quantmill --debug ...` shows where" in done.output
    assert "Traceback" in CliRunner().invoke(main, ["--debug", *arguments]).output


def test_a_full_disk_says_how_much_is_free(tmp_path: Path) -> None:
    full = classify(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "gone" / "model.safetensors")))
    assert isinstance(full, DiskFull)
    assert re.search(
        rf"no space left for '.*model.safetensors': [\d.e+-]+ GB of [\d.e+-]+ GB are free in '{tmp_path}'", str(full)
    )
    assert "choose another --out" in str(full)


@given(st.sampled_from(sorted(zoos.Zoo.model_json_schema()["properties"])), st.data())
def test_a_slip_of_the_finger_in_a_key_is_guessed(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 1))
    slip = key[:place] + data.draw(st.sampled_from("qxz")) + key[place + 1 :]
    known = zoos.Zoo.model_json_schema()["properties"]
    if len(key) > 4:
        assert f"did you mean {key!r}? " == meant(slip, known)


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.lists(st.integers(0, 3), max_size=2)


@given(st.sampled_from(["name", "models", "recipes", "calibration", "verify", "publish", "storage"]), VALUES)
def test_no_value_of_a_key_brings_out_a_librarys_words(key: str, value: object) -> None:
    content = zoos.parse(GOOD, "zoo")
    assert isinstance(content, dict)
    said = _refusal({**content, key: value})
    assert not INTERNAL.search(said), said
    assert "got" in said or "needs calibration" in said or not said


def _refusal(content: object) -> str:
    try:
        zoos.check(content, "zoo")
    except ZooError as error:
        return str(error)
    return ""
