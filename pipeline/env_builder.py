"""Build environments for recipes whose packages conflict with the driver's; defined in YAML, used by name.

A version is built in its final folder (virtual environments can't be moved), which is named after the hash of all
inputs, and activated by the atomic rename of a symbolic link. A build that fails or is killed changes nothing: the last
version remains active, and the half-built folder is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from pydantic import Field, ValidationError, field_validator

from pipeline.zoo import shipped
from pipeline.zoo.problems import explain
from workers.errors import PreflightError, ZooError
from workers.machine import environments
from workers.machine.environments import RECORD, Built
from workers.machine.files import write_text
from workers.spec.base import Frozen, canonical_json, meant
from workers.spec.libraries import REFUSED

LOCK_LIST = "requirements.lock"
LOG = "pip.log"
BUILT = ".built"
# Workers need the driver's version of Ray, and the build of torch installed on this machine.
PINNED = ("ray", "torch")
# quantmill's requirements that a runtime's check imports, in an environment without torch and Ray.
CHECKING = ("pydantic", "numpy", "safetensors")

Say = Callable[[str], object]


class Definition(Frozen):
    """Definition of an environment: its packages beside quantmill and quantmill's requirements."""

    description: str
    packages: tuple[str, ...] = Field(min_length=1, description="Requirements, as pip takes them.")
    python: str | None = Field(None, description="Versions of Python that the packages take, as '>=3.11,<3.13'.")
    pip: tuple[str, ...] = Field((), description="Further options of pip, as --pre or --extra-index-url=URL.")
    alone: tuple[str, ...] = Field(
        (), description="Requirements installed after the packages, without their own (pip's --no-deps)."
    )
    without: tuple[str, ...] = Field(
        (), description="Distributions uninstalled at the end: those that came along and don't work here."
    )
    inherit: bool = Field(
        False,
        description="Take what is installed beside this quantmill as it is, and install only what isn't, or is wanted "
        "in another version. Small and quick; usable as long as that installation stands.",
    )
    stages: bool = Field(
        True,
        description="false: only a runtime's check runs there, not the stages of a recipe: the environment has neither "
        "torch nor Ray, unless its packages bring them.",
    )

    @field_validator("packages", "alone", "without")
    @classmethod
    def _are_requirements(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for package in value:
            try:
                Requirement(package)
            except InvalidRequirement as error:
                raise ValueError(f"{package!r} is no requirement ({error}); write it as 'name>=1.2'") from error
        return value

    @field_validator("python")
    @classmethod
    def _is_a_specifier(cls, value: str | None) -> str | None:
        try:
            SpecifierSet(value or "")
        except InvalidSpecifier as error:
            raise ValueError(f"no version bounds ({error}); write them as '>=3.11,<3.13'") from error
        return value


@dataclass(frozen=True)
class Row:
    """An environment's row in ``quantmill env list``; ``size`` in bytes."""

    name: str
    state: str
    description: str
    path: Path
    size: int


def known() -> list[str]:
    """Names of the shipped definitions, sorted."""
    return sorted(path.stem for path in (shipped.configs() / "environments").glob("*.yaml"))


def definition(name: str, source: Path | None = None) -> Definition:
    """The definition of that name: from a file, shipped, or recorded when the environment was last built.

    Raises:
        ZooError: the definition doesn't exist, or is invalid.
    """
    if source is not None:
        if name in known():
            raise ZooError(f"--from: {name!r} is shipped with quantmill; choose another name for {str(source)!r}")
        return _read(source)
    if name in known():
        return _read(shipped.configs() / "environments" / f"{name}.yaml")
    if record := environments.built(name):
        return Definition.model_validate(record.definition)
    if reason := REFUSED.get(name):
        raise ZooError(f"env: there is no environment {name!r}: {reason}")
    raise ZooError(
        f"env: unknown environment, got {name!r}; {meant(name, known())}quantmill knows {', '.join(known())}. Name one "
        "of them, or give a definition by --from FILE.yaml (description, packages)"
    )


def folder_of(name: str, wanted: Definition) -> Path:
    """The folder of the version that a definition makes on this machine, whether it's built or not."""
    return _versions(name) / _record(name, wanted).identity[:16]


def create(name: str, source: Path | None = None, say: Say = print) -> Path:
    """Build an environment unless it is up to date with its definition; returns its interpreter.

    A lock file serializes concurrent builds.

    Raises:
        ZooError: the definition is invalid, or a folder of that name wasn't made by quantmill.
        PreflightError: pip or the check of the environment failed; the message has pip's errors and its log's path.
    """
    link = environments.folder(name)
    wanted = definition(name, source)
    record = _record(name, wanted)
    if _by_hand(link):
        raise ZooError(f"env: {str(link)!r} was made by hand; delete it, or choose another name")
    _check_python(name, wanted)
    with alone(name, say):
        version = folder_of(name, wanted)
        if (version / RECORD).is_file() and link.resolve() == version.resolve():
            say(f"{name}: stands as it's defined, {link}")
            return environments.interpreter(name)
        begun = datetime.now(UTC)
        if not (version / RECORD).is_file():
            _build(version, record, wanted, say)
        _switch(link, version)
        seconds = (datetime.now(UTC) - begun).total_seconds()
        say(f"{name}: ready in {seconds:.0f} s, {in_words(_size(version))}, {link}")
        for old in _versions(name).iterdir():
            if old.name != version.name:
                shutil.rmtree(old)
    return environments.interpreter(name)


def remove(name: str, say: Say = print) -> None:
    """Delete an environment that ``create`` made, and its half-built versions.

    Raises:
        ZooError: it doesn't exist, or was made by hand.
    """
    link = environments.folder(name)
    if _by_hand(link):
        raise ZooError(f"env: {str(link)!r} was made by hand; delete it yourself")
    if not link.is_symlink() and not _versions(name).exists():
        raise ZooError(f"env: no environment {name!r} in {str(link.parent)!r}; `quantmill env list` shows all")
    with alone(name, say):
        link.unlink(missing_ok=True)
        if _versions(name).exists():
            shutil.rmtree(_versions(name))
    say(f"{name}: removed from {link}")


def rows() -> list[Row]:
    """The known environments and those on this machine, sorted by name."""
    root = environments.root()
    existing = [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    half_built = [path.name for path in (root / BUILT).iterdir()] if (root / BUILT).is_dir() else []
    return [_row(name) for name in sorted({*known(), *existing, *half_built})]


def _row(name: str) -> Row:
    link = environments.folder(name)
    record = environments.built(name)
    state = "built"
    if not (link / "bin" / "python").exists():
        state = "half-built" if _versions(name).exists() else "not built"
    elif record is None:
        state = "made by hand"
    elif record.identity != _record(name, definition(name)).identity:
        state = "outdated"
    description = (
        record.definition["description"] if record else definition(name).description if name in known() else ""
    )
    return Row(name, state, description, link, _size(link.resolve()) if link.exists() else 0)


def _read(path: Path) -> Definition:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ZooError(f"{path}: not a readable YAML file ({error})") from error
    try:
        return Definition.model_validate(raw)
    except ValidationError as error:
        raise ZooError(explain(error, str(path), raw)) from error


def _check_python(name: str, wanted: Definition) -> None:
    if not SpecifierSet(wanted.python or "").contains(platform.python_version()):
        raise ZooError(
            f"environment {name!r}: expected Python {wanted.python}, got {platform.python_version()}, which is this "
            "process's; Ray demands the same on both sides: run quantmill by such a Python"
        )


def _record(name: str, wanted: Definition) -> Built:
    pinned = PINNED if wanted.stages else ()
    packages = {p: v for p in (*pinned, "quantmill") if (v := environments.version(p))}
    # Left out where they're the default, so that environments built before these fields stay up to date.
    left_out = {"description", *(name for name in ("stages", "alone", "without") if _is_default(wanted, name))}
    content = {
        "definition": wanted.model_dump(mode="json", exclude=left_out),
        "python": environments.minor(platform.python_version()),
        "packages": packages,
        "beside": sys.prefix if wanted.inherit else None,
    }
    return Built(
        name=name,
        identity=hashlib.sha256(canonical_json(content).encode()).hexdigest(),
        definition=wanted.model_dump(mode="json"),
        python=platform.python_version(),
        packages=packages,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _is_default(wanted: Definition, field: str) -> bool:
    return bool(getattr(wanted, field) == Definition.model_fields[field].default)


def _by_hand(path: Path) -> bool:
    """Whether something exists at the path that isn't our symbolic link."""
    return os.path.lexists(path) and not (path.is_symlink() and path.readlink().parts[0] == BUILT)


def _versions(name: str) -> Path:
    return environments.root() / BUILT / name


@contextmanager
def alone(name: str, say: Say) -> Iterator[None]:
    """Hold the environment's lock file, so that only one process changes it; a process's end releases it."""
    locks = environments.root() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"{name}: waiting for another process that works on it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, record: Built, wanted: Definition, say: Say) -> None:
    if folder.exists():
        say(f"{record.name}: an earlier build wasn't finished; building anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    pinned_versions = ", ".join(f"{name} {version}" for name, version in record.packages.items())
    say(f"{record.name}: Python {record.python}, {pinned_versions}; in {folder}")
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    if wanted.inherit:
        (site / "quantmill-beside.pth").write_text("".join(f"{path}\n" for path in _beside()))
    requested = {canonicalize_name(Requirement(package).name) for package in wanted.packages}
    pins = {name: pin for name in PINNED if name not in requested and (pin := record.packages.get(name))}
    needs = _needs() if wanted.stages else [need for need in _needs() if Requirement(need).name in CHECKING]
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
    pip = _Pip(record.name, folder, [f"--constraint={constraints}", *wanted.pip])
    if wanted.stages and not wanted.inherit:
        # Install torch first, alone: with other packages, the resolver may pick another build of several GB.
        torch = next((p for p in wanted.packages if canonicalize_name(Requirement(p).name) == "torch"), "torch")
        say(f"{record.name}: installing {torch}")
        pip.install(torch)
    say(f"{record.name}: installing {', '.join(wanted.packages)}, and what quantmill needs")
    pip.install(*needs, *wanted.packages)
    if wanted.alone:
        pip.install("--no-deps", *wanted.alone)
    if wanted.without:
        pip.uninstall(*wanted.without)
    _copy_quantmill(site)
    say(f"{record.name}: checking")
    _check(record.name, folder, wanted.stages)
    write_text(folder / LOCK_LIST, pip.freeze())
    write_text(folder / RECORD, record.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class _Pip:
    """Runs this process's pip on another environment, which needs no pip of its own."""

    name: str
    folder: Path
    options: list[str]

    def install(self, *requirements: str) -> None:
        self._run("install", "--no-input", "--progress-bar=off", *self.options, *requirements)

    def uninstall(self, *names: str) -> None:
        """Remove distributions; one that isn't there changes nothing."""
        self._run("uninstall", "--yes", *names)

    def freeze(self) -> str:
        return self._run("freeze")

    def _run(self, *arguments: str) -> str:
        python = self.folder / "bin" / "python"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        log = self.folder / LOG
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n{ended.stdout}{ended.stderr}\n")
        if ended.returncode:
            errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr[-500:]]
            raise PreflightError(
                f"environment {self.name!r}: pip {arguments[0]} failed: {' '.join(errors).strip()}; all it said is in "
                f"{log}; correct the definition, or pip's configuration (index, proxy), and run `quantmill env create "
                f"{self.name}` again"
            )
        return ended.stdout


def _beside() -> list[str]:
    """Folders on this Python's path with installed packages, inherited ones included, without the standard library."""
    code = "import sys; print(*sys.path, sep=chr(10))"
    answer = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    standard = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    standard |= {path / "lib-dynload" for path in standard}
    return [line for line in answer.splitlines() if Path(line).is_dir() and Path(line) not in standard]


def _needs() -> list[str]:
    """quantmill's own requirements, without its extras."""
    requirements = [Requirement(text) for text in _quantmill().requires or []]
    return [str(r) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _quantmill() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("quantmill")
    except importlib.metadata.PackageNotFoundError as error:
        raise PreflightError("env: quantmill isn't installed, only its code is here; pip install it") from error


def _copy_quantmill(site: Path) -> None:
    """Copy the running quantmill: an installed wheel's files, or an editable install's path to the checkout."""
    distribution = _quantmill()
    for path in distribution.files or []:
        if path.parts[0] != ".." and path.suffix != ".pyc":  # skip the command in bin and byte code
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(distribution.locate_file(path)), target)


def _check(name: str, folder: Path, stages: bool) -> None:
    """Check that a worker can start there: quantmill imports, and Ray and torch if stages run there."""
    code = "import workers.machine.preflight, workers.machine.child, workers.verify.runtimes.reply"
    if stages:
        code = "import ray, torch, transformers, workers.run, workers.machine.preflight"
    ended = subprocess.run(
        [folder / "bin" / "python", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise PreflightError(
            f"environment {name!r} was installed, but doesn't work: {ended.stderr.strip().splitlines()[-1]}; correct "
            f"its packages, and run `quantmill env create {name}` again"
        )


def _switch(link: Path, version: Path) -> None:
    """Point the environment's link at a version, by an atomic rename."""
    next_link = link.parent / BUILT / f".{link.name}-next"
    next_link.unlink(missing_ok=True)
    next_link.symlink_to(version.relative_to(link.parent))
    next_link.replace(link)


def in_words(size: int) -> str:
    """Format bytes as GB or MB (powers of 1000)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _size(folder: Path) -> int:
    """Bytes that a folder takes on disk."""
    entries = (os.lstat(Path(top) / name) for top, _, names in os.walk(folder) for name in names)
    return sum(entry.st_blocks * 512 for entry in entries)
