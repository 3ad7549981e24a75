"""Where environments lie, and which of them a stage may be started in."""

import platform
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from workers.errors import PreflightError
from workers.machine import environments
from workers.machine.environments import RECORD, Built
from workers.machine.preflight import MachineFacts, probe
from workers.spec.data import Calibration, Dataset
from workers.spec.job import ModelPin, fingerprint
from workers.spec.recipes import BitsAndBytesRecipe, GptqRecipe
from workers.spec.schemes import FourBitFloatScheme, IntScheme


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTMILL_ENVS", str(tmp_path / "envs"))
    return tmp_path / "envs"


def by_hand(folder: Path, borrowing: str = "") -> Path:
    """A virtual environment, which may borrow packages from another folder."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "beside.pth").write_text(borrowing + "\n")
    return folder


def test_the_root_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments.root() == tmp_path / "envs"
    monkeypatch.delenv("QUANTMILL_ENVS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert environments.root() == tmp_path / "cache/quantmill/envs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert environments.root() == tmp_path / "home/.cache/quantmill/envs"


def test_one_that_is_not_there_is_told_with_the_command_that_builds_it(root: Path) -> None:
    with pytest.raises(PreflightError, match=r"'gptq' isn't built on .*; run `quantmill env create gptq`") as raised:
        environments.interpreter("gptq")
    assert platform.node() in str(raised.value)
    assert str(root / "gptq/bin/python") in str(raised.value)
    (root / "gptq/bin").mkdir(parents=True)
    (root / "gptq/bin/python").symlink_to(root / "a Python that was removed")
    with pytest.raises(PreflightError, match="isn't built"):
        environments.interpreter("gptq")


@pytest.mark.parametrize("name", ["../other", "/etc", "Upper", "", ".built"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(PreflightError, match="small letters"):
        environments.interpreter(name)


def test_one_made_by_hand_is_used_if_it_has_what_ray_demands(root: Path) -> None:
    by_hand(root / "bare")
    by_hand(root / "mine", sysconfig.get_path("purelib"))
    (root / "broken/bin").mkdir(parents=True)
    broken = root / "broken/bin/python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    usable, problems = environments.interpreters(["bare", "mine", "broken", "gone"])
    assert usable == {"mine": str(root / "mine/bin/python")}
    assert "no ray, expected 2." in problems["bare"]
    assert "no quantmill, expected" in problems["bare"]
    assert "quantmill env create" not in problems["bare"], "it would refuse to touch it"
    assert "doesn't run" in problems["broken"]
    assert "isn't built" in problems["gone"]


def test_one_built_for_another_ray_is_refused(root: Path) -> None:
    folder = by_hand(root / "old")
    mine = {name: version for name in ("ray", "quantmill") if (version := environments.version(name))}

    def write(python: str, packages: dict[str, str]) -> None:
        record = Built(
            name="old", identity="0" * 64, definition={}, python=python, packages=packages, created_at="2026-11-21"
        )
        (folder / RECORD).write_text(record.model_dump_json())

    write(platform.python_version(), mine)
    assert environments.interpreter("old") == folder / "bin/python"
    write(f"{environments.minor(platform.python_version())}.99", mine)
    assert environments.interpreter("old"), "another patch release speaks the same protocol"
    write("3.9.1", {**mine, "ray": "2.0.0"})
    with pytest.raises(PreflightError, match=r"has Python 3\.9\.1, .*, ray 2\.0\.0, .*env create old"):
        environments.interpreter("old")
    (folder / RECORD).write_text("{")
    with pytest.raises(PreflightError, match=r"(?s)isn't readable.*env remove old"):
        environments.interpreter("old")


def test_one_for_checks_alone_needs_no_ray(root: Path) -> None:
    folder = by_hand(root / "light")
    packages = {"quantmill": version} if (version := environments.version("quantmill")) else {}
    record = Built(
        name="light", identity="0" * 64, definition={"stages": False}, python=platform.python_version(),
        packages=packages, created_at="2026-11-25",
    )  # fmt: skip
    (folder / RECORD).write_text(record.model_dump_json())
    assert environments.interpreter("light") == folder / "bin/python"
    assert not environments.runs_stages("light")
    other = record.model_copy(update={"packages": {"quantmill": "0.0"}})
    (folder / RECORD).write_text(other.model_dump_json())
    with pytest.raises(PreflightError, match=r"has quantmill 0\.0, expected .*env create light`"):
        environments.interpreter("light")


def test_where_it_is_made_is_no_part_of_an_artifacts_identity() -> None:
    model = ModelPin(id="a/b", revision="0" * 40)
    text = Calibration(dataset=Dataset(path="text", data_files=("a.txt",)))
    gptq = GptqRecipe(name="g", method="gptq", scheme=IntScheme(bits=4), format="gptq")
    nf4 = BitsAndBytesRecipe(name="n", method="bitsandbytes", scheme=FourBitFloatScheme(type="nf4"))
    for recipe in (gptq, nf4):
        elsewhere = recipe.model_copy(update={"environment": "gptq"})
        assert fingerprint(model, elsewhere, text, "1") == fingerprint(model, recipe, text, "1")
    with pytest.raises(ValueError, match="environment"):
        GptqRecipe.model_validate({**gptq.model_dump(), "environment": "../x"})


def test_the_probe_looks_at_its_own_interpreter(root: Path, tmp_path: Path) -> None:
    """As it runs in an environment: by that interpreter's packages, not the driver's."""
    extra = tmp_path / "extra"
    (extra / "optimum-99.0.dist-info").mkdir(parents=True)
    (extra / "optimum-99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: optimum\nVersion: 99.0\n")
    checkout = Path(environments.__file__).parents[2]
    by_hand(root / "mine", f"{extra}\n{sysconfig.get_path('purelib')}\n{checkout}")
    code = "import pathlib, workers.machine.preflight as e; print(e.probe(pathlib.Path(), False).model_dump_json())"
    command = [environments.interpreter("mine"), "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = MachineFacts.model_validate_json(answer)
    assert found.packages["optimum"] == "99.0"
    assert found.packages["torch"] == probe(tmp_path, with_devices=False).packages["torch"]
