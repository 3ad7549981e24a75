"""Environments by name: definitions, building, taking into use, and the jobs that run there."""

import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from pipeline import doctor, env_builder
from pipeline.env_builder import Definition
from pipeline.planning.plan import make_plan
from pipeline.zoo import zoo
from tests.limits import SOON_SECONDS
from tests.pipeline.runs import MODELS, ROOT
from workers.errors import PreflightError, ZooError
from workers.machine.environments import RECORD, interpreter
from workers.machine.preflight import probe

TEXT = ROOT / "tests/zoo/text"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTMILL_ENVS", str(tmp_path / "envs"))
    return tmp_path / "envs"


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """A wheel with one module that knows its version, and requires others."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
        required = "".join(f"Requires-Dist: {need}\n" for need in needs)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/RECORD", f"{name}/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return path


def write(tmp_path: Path, *packages: str, extra: str = "") -> Path:
    """A definition that takes no network: it inherits what runs here, and has its packages from a folder."""
    path = tmp_path / "mine.yaml"
    listed = ", ".join(f'"{package}"' for package in packages)
    options = f'pip: ["--no-index", "--find-links={tmp_path / "wheels"}"]'
    path.write_text(f"description: of my own\npackages: [{listed}]\n{options}\ninherit: true\n{extra}")
    return path


def ask(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", env_builder.known())
def test_shipped_definitions_are_valid(name: str) -> None:
    found = env_builder.definition(name)
    assert found.description
    assert not found.inherit, "a shipped one stands for itself"
    assert f"`{name}`" in (ROOT / "docs/environments.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("packages: [a]", "description: required"),
        ("description: x\npackages: []", "packages"),
        ('description: x\npackages: ["a b"]', "'a b' is no requirement"),
        ("description: x\npackages: [a]\npython: new", "no version bounds"),
        ("description: x\npackages: [a]\npackage: [b]", "unknown key, got 'package'"),
        ("description: x\npackages: [a]\nalone: ['b c']", "'b c' is no requirement"),
        ("description: [", "not a readable YAML file"),
    ],
)
def test_wrong_definitions(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ZooError) as error:
        env_builder.create("mine", tmp_path / "x.yaml")
    assert said in str(error.value)


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(
        ZooError,
        match=r"unknown environment, got 'gtpq'; did you mean 'gptq'\? quantmill knows auto-gptq, auto-round.*--from",
    ):
        env_builder.create("gtpq")
    with pytest.raises(ZooError, match="'gptq' is shipped"):
        env_builder.create("gptq", write(tmp_path, "tiny"))
    with pytest.raises(ZooError, match="no environment 'gptq'"):
        env_builder.remove("gptq")
    with pytest.raises(ZooError, match=r"expected Python <3\.0, got 3"):
        env_builder.create("mine", write(tmp_path, "tiny", extra='python: "<3.0"'))


@pytest.mark.slow
def test_an_environment_from_its_definition_to_its_end(tmp_path: Path, root: Path) -> None:
    wheel(tmp_path / "wheels", "millstone", "1.0")
    wheel(tmp_path / "wheels", "shellingham", "99.0")  # which runs here too, in another version
    told: list[str] = []
    python = env_builder.create("mine", write(tmp_path, "millstone", "shellingham==99.0"), told.append)
    assert python == interpreter("mine") == root / "mine/bin/python"
    assert "ready" in told[-1]

    code = "import millstone, shellingham; print(millstone.VERSION, shellingham.VERSION)"
    assert ask(python, code) == "1.0 99.0"
    here = subprocess.run([sys.executable, "-c", "import shellingham; shellingham.VERSION"], check=False)
    assert here.returncode, "this environment's own is another, and unharmed"
    assert "millstone==1.0" in (root / "mine/requirements.lock").read_text()
    assert Path(ask(python, "import workers; print(workers.__file__)")).parents[1] == ROOT

    first = (root / "mine").resolve()
    told.clear()
    env_builder.create("mine", None, told.append)
    assert told == [f"mine: stands as it's defined, {root / 'mine'}"], "its record knows the definition"

    with pytest.raises(PreflightError, match=r"pip install failed.*No matching.*nothing-like-it.*pip\.log"):
        env_builder.create("mine", write(tmp_path, "nothing-like-it"), told.append)
    assert ask(interpreter("mine"), code) == "1.0 99.0", "what stood before is still used"
    shipped = dict.fromkeys(env_builder.known(), "not built")
    assert {row.name: row.state for row in env_builder.rows()} == {**shipped, "mine": "built"}

    # A build that was killed half-way: its folder is there, its record isn't.
    wheel(tmp_path / "wheels", "millstone", "2.0")
    changed = write(tmp_path, "millstone>=2")
    half = env_builder.folder_of("mine", env_builder.definition("mine", changed))
    (half / "bin").mkdir(parents=True)
    (half / "bin/python").write_text("half")
    told.clear()
    python = env_builder.create("mine", changed, told.append)
    assert any("wasn't finished" in line for line in told)
    assert (root / "mine").resolve() == half
    assert ask(python, "import millstone; print(millstone.VERSION)") == "2.0"
    assert (half / RECORD).is_file()
    assert not first.exists(), "old versions go"
    assert list(half.parent.iterdir()) == [half]

    env_builder.remove("mine", told.append)
    assert not (root / "mine").is_symlink()
    assert not half.exists()
    with pytest.raises(PreflightError, match="isn't built"):
        interpreter("mine")


@pytest.mark.slow
def test_packages_without_their_requirements_and_without_what_came_along(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "millstone", "1.0", "chaff")
    wheel(tmp_path / "wheels", "chaff", "1.0")
    wheel(tmp_path / "wheels", "sieve", "1.0", "nothing-like-it")
    extra = "alone: [sieve]\nwithout: [chaff, never-there]\nstages: false\n"
    python = env_builder.create("mine", write(tmp_path, "millstone", extra=extra), lambda line: None)
    assert ask(python, "import millstone, sieve; print(sieve.VERSION)") == "1.0"
    found = ask(python, "import importlib.util; print(importlib.util.find_spec('chaff'))")
    assert found == "None", "it came with millstone, and was uninstalled"


def test_what_was_made_by_hand_is_left_alone(tmp_path: Path, root: Path) -> None:
    (root / "gptq").mkdir(parents=True)
    (root / "gptq/precious").write_text("")
    for touch in (env_builder.create, env_builder.remove):
        with pytest.raises(ZooError, match="made by hand"):
            touch("gptq")
    (root / "gptq/precious").unlink()
    (root / "gptq").rmdir()
    (root / "gptq").symlink_to(tmp_path)
    with pytest.raises(ZooError, match="made by hand"):
        env_builder.remove("gptq")


def test_two_at_a_time_wait_for_one_another(tmp_path: Path) -> None:
    """The second comes while the first holds the lock, says that it waits, and goes on when it's free."""
    inside, waiting, order = threading.Event(), threading.Event(), []

    def second() -> None:
        inside.wait()
        with env_builder.alone("mine", lambda line: waiting.set()):
            order.append("second")

    other = threading.Thread(target=second)
    other.start()
    with env_builder.alone("mine", print):
        inside.set()
        assert waiting.wait(SOON_SECONDS), "it says that it waits"
        order.append("first")
    other.join(SOON_SECONDS)
    assert order == ["first", "second"]


def zoo_file(tmp_path: Path) -> Path:
    recipe = "method: bitsandbytes, environment"
    path = tmp_path / "zoo.yaml"
    path.write_text(
        f"""
name: small
models: [{{id: {MODELS}/llama-tiny}}, {{id: {MODELS}/gpt2-tiny, recipes: [a, d]}}]
recipes:
  - {{name: a, scheme: {{type: nf4}}, {recipe}: other}}
  - {{name: b, scheme: {{type: fp4}}, method: bitsandbytes}}
  - {{name: c, scheme: {{type: llm-int8}}, {recipe}: other}}
  - {{name: d, scheme: {{type: nf4, double_quantization: false}}, {recipe}: third}}
verify: {{dataset: {{path: text, data_files: [{TEXT}/heldout.txt]}}}}
"""
    )
    return path


def test_recipes_of_different_environments_are_jobs_of_their_own(tmp_path: Path) -> None:
    path = zoo_file(tmp_path)
    plan = make_plan(zoo.load(path), tmp_path, tmp_path / "runs", None)
    jobs = [(Path(job.model.id).name, [order.recipe.name for order in job.orders]) for job in plan.jobs]
    assert jobs == [
        ("llama-tiny", ["a", "c"]),
        ("llama-tiny", ["b"]),
        ("llama-tiny", ["d"]),
        ("gpt2-tiny", ["a"]),
        ("gpt2-tiny", ["d"]),
    ]


def test_the_doctor_judges_a_recipe_by_its_environment(tmp_path: Path, root: Path) -> None:
    recipes = doctor.recipes([], zoo_file(tmp_path))
    (root / "third/bin").mkdir(parents=True)
    (root / "third/bin/python").symlink_to(sys.executable)
    (root / "third/pyvenv.cfg").write_text(Path(sys.prefix, "pyvenv.cfg").read_text())
    here = probe(tmp_path, with_devices=False)
    found = doctor.examine(recipes, here, tmp_path)
    assert found["b"] == []
    assert "run `quantmill env create other`" in found["a"][0]
    assert "no ray" in found["d"][0], "an interpreter with nothing in it"
    with pytest.raises(ZooError, match="has no recipe 'z'; it has a, b, c, d"):
        doctor.recipes(["z"], zoo_file(tmp_path))


def test_identity_of_a_definition() -> None:
    """What is installed decides, not how it's described."""
    first = Definition(description="x", packages=("a",))
    same = env_builder.folder_of("mine", first.model_copy(update={"description": "y"}))
    assert same == env_builder.folder_of("mine", first)
    for field in ("alone", "without"):
        assert env_builder.folder_of("mine", first.model_copy(update={field: ("b",)})) != same
    assert env_builder.folder_of("mine", first.model_copy(update={"packages": ("a", "b")})) != same
    assert env_builder.folder_of("mine", first.model_copy(update={"inherit": True})) != same
