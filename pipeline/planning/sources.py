"""Pin the zoo's models and data to exact content (commits and hashes), reading headers and hashes alone."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.zoo.zoo import ModelEntry
from workers.errors import CalibrationError, CheckpointError, ModelNotFound, UnsupportedModel
from workers.machine.files import file_sha256, folder_sha256
from workers.spec.base import canonical_json
from workers.spec.families import Family, family_of
from workers.spec.job import Dataset, ModelPin
from workers.spec.tensors import TensorHeader
from workers.transfer import hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUILDERS = frozenset({"text", "json", "csv", "parquet", "arrow", "pandas", "xml", "webdataset"})
CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel|LMHead)$")


@dataclass(frozen=True)
class PinnedModel:
    """A pinned model, its config and its tensors; a pickled checkpoint has no tensors here."""

    pin: ModelPin
    config: dict[str, Any]
    tensors: tuple[TensorHeader, ...]

    @property
    def family(self) -> Family:
        """The family row of the model's ``model_type``."""
        return family_of(self.config.get("model_type"))

    @property
    def name(self) -> str:
        """The last part of the id, used in the names of published repositories."""
        return Path(self.pin.id).name


def resolve(entry: ModelEntry, zoo_folder: Path) -> PinnedModel:
    """Pin one model: a folder by its content, a repository by its commit.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, HubRefused, HubUnavailable
    """
    folder = (zoo_folder / entry.id).resolve()
    looks_like_path = entry.id.startswith((".", "/", "~")) or entry.id.count("/") != 1
    if folder.is_dir():
        source = _resolve_folder(entry, folder)
    elif looks_like_path:
        raise ModelNotFound(
            f"models: no such folder, got {entry.id!r} (looked at {folder}); "
            "give a folder relative to the zoo file, or a Hub repository as org/name"
        )
    else:
        source = _resolve_repository(entry, hub.connect())
    _check_loadable(entry, source.config)
    return source


def _check_loadable(entry: ModelEntry, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if architectures and not any(CAUSAL_LM.search(name) for name in architectures):
        raise UnsupportedModel(
            f"models: {entry.id!r} has no causal LM head, got architectures {architectures}; "
            "quantmill quantizes decoders (a class ...ForCausalLM or ...LMHeadModel)"
        )
    if config.get("auto_map") and not entry.trust_remote_code:
        raise UnsupportedModel(
            f"models: {entry.id!r} comes with code of its own (auto_map in config.json), which is not run; "
            "read that code, then set trust_remote_code: true for this model"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UnsupportedModel(
            f"models: {entry.id!r} is quantized already, got quant_method {method!r}; name the original checkpoint"
        )


# ------------------------------------------------------------------------------------------------- folders


def _resolve_folder(entry: ModelEntry, folder: Path) -> PinnedModel:
    config = _read_config(entry, folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        _refuse_pickle(entry, [path.name for path in sorted(folder.iterdir())])
    tensors = tuple(header for path in weights for header in read_header(path))
    pin = ModelPin(
        id=entry.id,
        revision=folder_sha256(folder),
        folder=str(folder),
        trust_remote_code=entry.trust_remote_code,
        allow_pickle=entry.allow_pickle,
    )
    return PinnedModel(pin, config, tensors)


def _read_config(entry: ModelEntry, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"models: {entry.id!r} has no config.json; name a transformers checkpoint")
    return _parsed(entry, path.read_bytes())


def _parsed(entry: ModelEntry, text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"models: {entry.id!r}: config.json is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"models: {entry.id!r}: config.json: expected a mapping, got {type(config).__name__}")
    return config


def _refuse_pickle(entry: ModelEntry, files: list[str]) -> None:
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if not pickles:
        raise CheckpointError(f"models: {entry.id!r} has no weights, got files {files[:8]}; expected *.safetensors")
    if not entry.allow_pickle:
        raise UnsupportedModel(
            f"models: {entry.id!r} has pickle weights only, got {pickles[:3]}; a pickle can run code. Convert it to "
            "safetensors, or set allow_pickle: true for this model (it is then read with weights_only=True)"
        )


def read_header(path: Path) -> list[TensorHeader]:
    """List the tensors of a safetensors file from its header alone.

    Raises:
        CheckpointError: the file isn't safetensors, or is shorter than its header says.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            if length > size:
                raise CheckpointError(f"{path}: truncated or no safetensors file, got {size} bytes; fetch it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable safetensors header: {error}; fetch it again") from error
    if end != size:
        raise CheckpointError(f"{path}: truncated, got {size} bytes, its header says {end}; fetch it again")
    return [TensorHeader(name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()]


# -------------------------------------------------------------------------------------------- repositories


def _resolve_repository(entry: ModelEntry, api: HfApi) -> PinnedModel:
    with hub.hub_errors(f"models: {entry.id}@{entry.revision} on {api.endpoint}"):
        info = api.model_info(entry.id, revision=entry.revision)
        commit = str(info.sha)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if "config.json" not in files:
            raise CheckpointError(f"models: {entry.id!r} has no config.json; name a transformers checkpoint")
        raw = hub.read_file(api, entry.id, "config.json", commit)
        tensors = _remote_tensors(entry, api, commit, files)
    pin = ModelPin(
        id=entry.id,
        revision=commit,
        endpoint=api.endpoint,
        trust_remote_code=entry.trust_remote_code,
        allow_pickle=entry.allow_pickle,
    )
    return PinnedModel(pin, _parsed(entry, raw[0] if raw else b""), tensors)


def _remote_tensors(entry: ModelEntry, api: HfApi, commit: str, files: list[str]) -> tuple[TensorHeader, ...]:
    if not any(name.endswith(".safetensors") for name in files):
        _refuse_pickle(entry, files)
        return ()
    metadata = api.get_safetensors_metadata(entry.id, revision=commit)
    return tuple(
        TensorHeader(name, tuple(tensor.shape), str(tensor.dtype))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    )


# ---------------------------------------------------------------------------------------------------- data


def pin_dataset(dataset: Dataset, zoo_folder: Path, where: str) -> tuple[Dataset, str]:
    """Pin a data set: with absolute paths, or to a commit; returns it with the sha256 that identifies its content.

    Raises:
        CalibrationError: a file doesn't exist or can't be read.
    """
    if dataset.path not in BUILDERS and not (zoo_folder / dataset.path).exists():
        return _pin_remote_dataset(dataset, where)
    files = [_data_file(zoo_folder / name, name, where) for name in dataset.data_files]
    pinned = dataset.model_copy(update={"data_files": tuple(str(path) for path in files)})
    if dataset.path not in BUILDERS:
        folder = (zoo_folder / dataset.path).resolve()
        parts = [folder_sha256(folder), dataset.name, dataset.split, list(dataset.data_files)]
        return pinned.model_copy(update={"path": str(folder)}), _sha256(parts)
    if not files:
        raise CalibrationError(f"{where}: the builder {dataset.path!r} needs data_files; list at least one file")
    content = {"builder": dataset.path, "split": dataset.split, "files": [file_sha256(path) for path in files]}
    return pinned, _sha256(content)


def _sha256(content: object) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _data_file(path: Path, name: str, where: str) -> Path:
    path = path.resolve()
    if not path.is_file():
        raise CalibrationError(
            f"{where}: no such file, got {name!r} (looked at {path}); give it relative to the zoo file"
        )
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise CalibrationError(f"{where}: {path} can't be read: {error}; mend its permissions") from error
    return path


def _pin_remote_dataset(dataset: Dataset, where: str) -> tuple[Dataset, str]:
    api = hub.connect()
    with hub.hub_errors(f"{where}: data set {dataset.path} on {api.endpoint}"):
        commit = str(api.dataset_info(dataset.path, revision=dataset.revision).sha)
    pinned = dataset.model_copy(update={"revision": commit})
    return pinned, _sha256(pinned.model_dump(mode="json"))
