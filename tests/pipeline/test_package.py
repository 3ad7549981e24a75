"""The package as users get it: quick help, a driver without torch, a wheel that carries what the command needs."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.pipeline.runs import MODELS, ROOT, write_zoo


def test_help_answers_at_once() -> None:
    """By the CPU time that it takes, which is the same on a busy machine, and by what it leaves alone."""
    code = (
        "import sys, time\nfrom pipeline.cli.main import main\nmain(['--help'], standalone_mode=False)\n"
        "print(time.process_time(), sorted({'ray', 'pydantic', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    said = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(3)]
    seconds, loaded = zip(*(done.stdout.splitlines()[-1].split(maxsplit=1) for done in said), strict=True)
    assert min(map(float, seconds)) < 0.5
    assert set(loaded) == {"[]"}


def test_the_driver_never_loads_torch(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4, gptq-w4-g128")
    code = (
        "import importlib, pkgutil, sys, pipeline\n"
        "for module in pkgutil.walk_packages(pipeline.__path__, 'pipeline.'):\n"
        "    importlib.import_module(module.name)\n"
        "import ray, workers.run\n"
        "from pipeline.cli.main import main\n"
        f"main(['plan', {str(zoo)!r}, '--out', {str(tmp_path / 'runs')!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment of its own, which borrows nothing but the dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    wheel = next(folder.glob("quantmill-*.whl"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", str(folder)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    # A path, not a site folder: the editable install's own .pth there is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "quantmill"


def test_the_wheel_plans_a_zoo_from_another_folder(installed: Path, tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4, rtn-w4-g128")
    (tmp_path / "elsewhere").mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed, "plan", str(zoo)],
        cwd=tmp_path / "elsewhere", env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 artifacts, 2 to make" in done.stdout
    python = installed.with_name("python")
    code = (
        "import pipeline, pathlib; from pipeline.zoo import shipped; from pipeline import report\n"
        "print(pathlib.Path(pipeline.__file__).parent, len(shipped.recipe_names()), len(shipped.gates()))\n"
        "print((pathlib.Path(report.__file__).parent / 'report.html.j2').is_file())"
    )
    there = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    where = there.stdout
    assert str(installed.parents[1]) in where, "the wheel's own files are used, not the checkout's"
    assert where.splitlines()[-1] == "True"


def test_the_wheel_has_the_default_text_and_the_package_of_its_name(installed: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [installed, "quantize", str(MODELS / "llama-tiny"), "--recipe", "gptq-w4-g128", "--dry-run"]
    planned = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert "1 artifacts, 1 to make" in planned.stdout
    code = (
        "import quantmill; from pipeline.zoo import shipped\n"
        "learned, held_out = shipped.own_text()\n"
        "print(quantmill.__file__, *learned, held_out, len(quantmill.recipes()), sep='\\n')\n"
        "print(sum(bool(row.kl) for row in quantmill.recipes()))"
    )
    python = installed.with_name("python")
    there = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    *files, recipes, measured = there.stdout.splitlines()
    assert len(files) == 4
    for path in files:
        assert str(installed.parents[1]) in path, "the wheel's own files are used, not the checkout's"
        assert Path(path).is_file()
    assert int(recipes) > int(measured) > 20


def test_the_version_has_its_entry_in_the_changelog(installed: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version
    said = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"quantmill, version {version}\n"


@pytest.mark.slow
def test_the_wheel_makes_a_checkpoint(installed: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [installed, "quantize", str(MODELS / "llama-tiny"), "--recipe", "rtn-w4-g128", "--to", "me"]
    done = subprocess.run(
        [*command, "--endpoint", "loopback", "--json"],
        cwd=tmp_path, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = json.loads(done.stdout)["artifacts"]
    assert (made["status"], made["repo_id"]) == ("published", "me/llama-tiny-rtn-w4-g128")
    card = (Path(made["path"]) / "README.md").read_text()
    assert "(quantmill.png)" in card
    assert "With quantmill 0." in card


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_wrong_zoo_is_exit_code_2_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text("name: x\nmodel: []\n")
    done = run_cli("run", "zoo.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "model: unknown key, got 'model'; did you mean 'models'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gone.yaml"], "no such file, got 'gone.yaml'"),
        (["status"], "no ledger in 'runs'"),
        (["report", "x"], "no results of run 'x'"),
        (["doctor", "gptq-w5"], "unknown recipe, got 'gptq-w5'"),
        (["publish", ".", "--to", "a/b"], "no readable quantmill.json"),
    ],
)
def test_wrong_command_lines(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_zoo_file_is_valid_and_never_overwritten(tmp_path: Path) -> None:
    from pipeline.zoo import zoo

    assert run_cli("init", cwd=tmp_path).returncode == 0
    assert zoo.load(tmp_path / "zoo.yaml").name == "first"
    again = run_cli("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_schema_and_doctor(tmp_path: Path) -> None:
    schema = json.loads(run_cli("schema", cwd=tmp_path).stdout)
    assert "recipes" in schema["properties"]
    doctor = run_cli("doctor", "gptq-w4-g128", "bnb-nf4", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert re.search(r"^gptq-w4-g128 +ready$", doctor.stdout, re.M)
    told = json.loads(run_cli("doctor", "bnb-nf4", "--json", cwd=tmp_path).stdout)
    assert told["problems"] == {"bnb-nf4": []}
    assert told["machine"]["host_memory"] > 0
    # Recipes that need an environment say how to build it, where it isn't.
    whole = run_cli("doctor", "--json", cwd=tmp_path)
    problems = json.loads(whole.stdout)["problems"]
    for recipe, environment in (("gguf-q4_k_m", "llama-cpp"), ("mlx-w4-g64", "mlx")):
        assert not problems[recipe] or f"run `quantmill env create {environment}` there" in problems[recipe][0]
    assert whole.returncode == int(any(problems.values()))
