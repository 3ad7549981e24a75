"""Pack what a submitted run needs: the code, the zoo file, and the local files and folders that the zoo names.

The parcel becomes the working directory of a Ray job: our packages at its top, so that the cluster needs only their
dependencies, and the zoo with its files in a folder beside them. Nothing else of the submitting machine is sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import yaml

import pipeline
import workers
from pipeline.planning.sources import BUILDERS, model_name
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry, Zoo
from workers.errors import ZooError
from workers.machine.files import file_sha256, files_to_send
from workers.spec.base import canonical_json
from workers.spec.data import Dataset

# Bytes. The head's dashboard rejects larger requests (DASHBOARD_CLIENT_MAX_SIZE, 100 MiB), and keeps uploads in memory.
LIMIT = 96 * 2**20
ZOO = "zoo"
ELSEWHERE = "elsewhere"
WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".parquet", ".gz", ".zst"}
)  # already compressed or incompressible


@dataclass(frozen=True)
class Parcel:
    """The zoo's text, and paths on this machine by their name in the job's working directory.

    ``notes`` name models that aren't there: the run fails them alone, and makes the others.
    """

    zoo: str
    text: bytes
    files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Uncompressed size in bytes."""
        return len(self.text) + sum(path.stat().st_size for path in self.files.values())

    def sha256(self) -> str:
        """Hash of names and contents; independent of when and from which folder the parcel was packed."""
        content = {name: file_sha256(path) for name, path in self.files.items()}
        content[self.zoo] = hashlib.sha256(self.text).hexdigest()
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the parcel as a zip file."""
        with ZipFile(path, "w") as archive:
            archive.writestr(ZipInfo(self.zoo), self.text, ZIP_DEFLATED)
            for name, source in sorted(self.files.items()):
                stored = ZIP_STORED if source.suffix in WEIGHTS else ZIP_DEFLATED
                archive.writestr(ZipInfo(name), source.read_bytes(), stored)


def pack(zoo: Zoo, zoo_path: Path, shared: Sequence[Path] = ()) -> Parcel:
    """Pack what a run of the zoo, read from ``zoo_path``, needs on a cluster.

    Paths in the ``shared`` folders exist on the cluster at the same path; they are neither packed nor checked here.

    Raises:
        ZooError: a data file or folder doesn't exist, or the parcel is larger than a Ray head accepts.
    """
    for folder in shared:
        if not folder.is_absolute():
            raise ZooError(f"--shared: expected an absolute path, got {str(folder)!r}; name it as every node sees it")
    if files := [name for name in zoo.plugins if name.endswith(".py")]:
        raise ZooError(
            f"plugins: {files[0]!r} is a file of this machine; install it on the cluster as a package with an entry "
            "point of the group quantmill, or name its module"
        )
    local = _Local(zoo_path.resolve().parent, tuple(Path(os.path.normpath(folder)) for folder in shared))
    updates = {"models": tuple(local.model(entry) for entry in zoo.models), "verify": zoo.verify}
    held_out = {"dataset": local.dataset(zoo.verify.dataset, "verify.dataset")}
    if zoo.verify.shown:
        held_out["shown"] = local.dataset(zoo.verify.shown, "verify.shown")
    updates["verify"] = zoo.verify.model_copy(update=held_out)
    if zoo.calibration:
        calibration = zoo.calibration
        texts = (local.dataset(text, calibration.where(index)) for index, text in enumerate(calibration.datasets))
        updates["calibration"] = calibration.with_datasets(tuple(texts))
    packed_zoo = zoo.model_copy(update=updates)
    content = packed_zoo.model_dump(mode="json", exclude_unset=True)
    zoo_text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
    parcel = Parcel(f"{ZOO}/{zoo_path.name}", zoo_text, {**local.files, **_code()}, tuple(local.notes))
    if parcel.bytes > LIMIT:
        largest = max(local.files.values(), key=lambda path: path.stat().st_size)
        raise ZooError(
            f"submit: the zoo's files are {parcel.bytes / 1e6:.0f} MB, more than the {LIMIT / 1e6:.0f} MB that travel "
            f"with a run; the largest is {largest}. Name the model by its Hub repository, or put it where every node "
            "sees it at the same path and say so: --shared FOLDER"
        )
    return parcel


def _code() -> dict[str, Path]:
    """Files of both packages, and the configs at the place where ``shipped.configs`` looks first."""
    roots = {package.__name__: Path(cast(str, package.__file__)).parent for package in (pipeline, workers)}
    return {
        name: path
        for root, folder in {**roots, "pipeline/configs": shipped.configs()}.items()
        for name, path in _visible(folder, root).items()
        if "__pycache__" not in path.parts
    }


def _visible(folder: Path, name: str) -> dict[str, Path]:
    """Files of a folder that aren't hidden, by name in the parcel; the same that ``files.folder_sha256`` hashes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [path.relative_to(folder).parts for path in files]
    return {
        "/".join((name, *inside)): path
        for path, inside in zip(files, parts, strict=True)
        if not any(part.startswith(".") for part in inside)
    }


class _Local:
    """Rewrites the paths that a zoo names for the cluster, and collects the files to send.

    Paths inside the zoo's folder keep their names; others are moved to a folder below it.
    """

    def __init__(self, folder: Path, shared: tuple[Path, ...]) -> None:
        self.files: dict[str, Path] = {}
        self.notes: list[str] = []
        self._elsewhere: dict[str, Path] = {}
        self._folder = folder
        self._shared = shared

    def model(self, entry: ModelEntry) -> ModelEntry:
        """The entry with its path on the cluster."""
        path = self._path(entry.id)
        if self._is_shared(path):
            return entry.model_copy(update={"id": str(path)})
        if path.is_dir():
            name = self._name(path)
            names = files_to_send(path, f"models: {entry.id!r}", variant=entry.variant, allow_pickle=entry.allow_pickle)
            self.files |= {f"{ZOO}/{name}/{file}": path / file for file in names}
            return entry.model_copy(update={"id": name, "as_name": entry.as_name or model_name(entry, self._folder)})
        if entry.id.startswith((".", "/", "~")) or entry.id.count("/") != 1:
            self.notes.append(_missing("models", entry.id, path, "folder"))
        return entry

    def dataset(self, dataset: Dataset, where: str) -> Dataset:
        """The data set with its paths on the cluster."""
        folder = self._path(dataset.path)
        local = folder.exists() or self._is_shared(folder)
        if dataset.path not in BUILDERS and not local:
            return dataset
        updates: dict[str, object] = {"data_files": tuple(self._file(name, where) for name in dataset.data_files)}
        if dataset.path not in BUILDERS:
            updates["path"] = str(folder) if self._is_shared(folder) else self._take(folder)
        return dataset.model_copy(update=updates)

    def _file(self, name: str, where: str) -> str:
        path = self._path(name)
        if self._is_shared(path):
            return str(path)
        if not path.is_file():
            raise ZooError(_missing(where, name, path, "file"))
        return self._take(path)

    def _path(self, name: str) -> Path:
        return Path(os.path.normpath(self._folder / name))

    def _is_shared(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._shared)

    def _take(self, path: Path) -> str:
        """Add a path to the parcel; returns its name relative to the zoo's folder there."""
        name = self._name(path)
        name_in_parcel = f"{ZOO}/{name}"
        self.files.update(_visible(path, name_in_parcel) if path.is_dir() else {name_in_parcel: path})
        return name

    def _name(self, path: Path) -> str:
        """A path's name in the parcel, relative to the zoo's folder there."""
        if path.is_relative_to(self._folder) and path != self._folder:
            name = path.relative_to(self._folder).as_posix()
        else:
            name = f"{ELSEWHERE}/{path.name}"
            if self._elsewhere.setdefault(name, path) != path:
                name = f"{ELSEWHERE}/{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}/{path.name}"
        return name


def _missing(where: str, name: str, path: Path, kind: str) -> str:
    return (
        f"{where}: no such {kind}, got {name!r} (looked at {path}); give it relative to the zoo file, or, where every "
        "node of the cluster sees it at the same path, name it from / on and add --shared FOLDER"
    )
