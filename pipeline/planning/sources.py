"""Pin the zoo's models and data to exact content (commits and hashes), reading headers and hashes alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.planning.configs import check_loadable, parse_config
from pipeline.planning.tokenizers import adds_special_tokens
from pipeline.zoo.zoo import ModelEntry
from workers.errors import CalibrationError, CheckpointError, ModelNotFound, UnsupportedModel
from workers.machine.files import (
    checkpoint_sha256,
    file_sha256,
    folder_sha256,
    open_checkpoint,
    read_bounded,
    read_head,
)
from workers.spec import kept, low_bit
from workers.spec.base import canonical_json
from workers.spec.bounds import CONFIG_BYTES, HEADER_BYTES
from workers.spec.checkpoint_files import CONFIG, CheckpointFiles, checkpoint_files, folder_left_out, summary
from workers.spec.data import Calibration, Dataset, SpecialTokens
from workers.spec.expert_stacks import split_experts
from workers.spec.families import Family, family_of
from workers.spec.job import ModelPin
from workers.spec.kept import Kept
from workers.spec.tensors import TensorHeader, parse_header
from workers.transfer import from_hub, hub
from workers.transfer.patience import Silence, insist

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUILDERS = frozenset({"text", "json", "csv", "parquet", "arrow", "pandas", "xml", "webdataset"})


@dataclass(frozen=True)
class PinnedModel:
    """A pinned model, its config and its tensors; a pickled checkpoint has no tensors here.

    ``name`` is used in tables and in the names of published repositories. ``notes`` say which of several checkpoints is
    taken, and what is left out.
    """

    pin: ModelPin
    config: dict[str, Any]
    tensors: tuple[TensorHeader, ...]
    name: str
    notes: tuple[str, ...] = ()
    # The codes of a source that is quantized already; its ``tensors`` are then as they are decoded.
    kept: Kept | None = None
    # The format of a source that is quantized already and is decoded; its ``tensors`` are then as they are decoded.
    decoded: str | None = None

    @property
    def family(self) -> Family:
        """The family row of the model's ``model_type``."""
        return family_of(self.config.get("model_type"))


def resolve(
    entry: ModelEntry,
    zoo_folder: Path,
    workspace: Path | None = None,
    silence: Silence | None = None,
    *,
    calibrated: bool = False,
    keeps: bool = False,
) -> PinnedModel:
    """Pin one model: a folder by its content, a repository by its commit. ``workspace`` may not lie in the folder.

    ``calibrated``: a recipe sees its tokens, so that its tokenizer's files are looked at, too. ``keeps``: it may be
    quantized already, for recipes that keep its codes.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel, HubRefused, HubUnavailable
    """
    folder = local_folder(entry, zoo_folder)
    if folder.is_dir():
        source = _resolve_folder(entry, folder, workspace, calibrated)
    elif looks_like_path(entry):
        raise ModelNotFound(
            f"models: no such folder, got {entry.id!r} (looked at {folder}); "
            "give a folder relative to the zoo file, or a Hub repository as org/name"
        )
    else:
        source = _resolve_repository(entry, hub.connect(), silence, calibrated)
    what = f"models: {entry.id!r}"
    if source.config.get("quantization_config") and (
        entry.source == "dequantize" or (low_bit.is_native(source.config) and not keeps)
    ):
        source = _decoded(source, what)
    elif keeps:
        source = _with_codes(source, what)
    if source.family.split_experts and not source.config.get("quantization_config"):
        source = replace(source, tensors=split_experts(source.tensors))
    known = source.kept is not None or source.decoded is not None
    check_loadable(source.config, source.tensors, what, entry.trust_remote_code, kept=known)
    return source


def _decoded(source: PinnedModel, what: str) -> PinnedModel:
    """The source as it is decoded.

    Raises:
        UnsupportedModel: it can't be told what it decodes to.
    """
    found = low_bit.read(source.config, source.tensors)
    if isinstance(found, str):
        raise UnsupportedModel(f"{what}: is quantized, and can't be decoded: {found}; name a half-precision original")
    note = f"{source.name}: is quantized ({found.format}); what it decodes to, in {found.dtype}, is the source"
    pin = source.pin.model_copy(update={"dequantize": True})
    return replace(source, pin=pin, tensors=found.tensors, decoded=found.format, notes=(*source.notes, note))


def _with_codes(source: PinnedModel, what: str) -> PinnedModel:
    """The source with its codes, if it is quantized.

    Raises:
        UnsupportedModel: its codes can't be kept.
    """
    declared = source.config.get("quantization_config")
    if not declared:
        return source
    found = kept.read(declared, source.tensors)
    if isinstance(found, str):
        raise UnsupportedModel(f"{what}: method: keep can't read it: {found}")
    return replace(source, tensors=found.tensors, kept=found)


def local_folder(entry: ModelEntry, zoo_folder: Path) -> Path:
    """The folder that an entry means, if it means one."""
    return (zoo_folder / Path(entry.id).expanduser()).resolve()


def looks_like_path(entry: ModelEntry) -> bool:
    """Whether an entry can't be the name of a repository."""
    return entry.id.startswith((".", "/", "~")) or entry.id.count("/") != 1


def model_name(entry: ModelEntry, zoo_folder: Path) -> str:
    """The name of a model in tables and repositories: its own in the zoo, or the last part of its id."""
    last = Path(entry.id).name
    return entry.as_name or (last if last not in ("", "..") else local_folder(entry, zoo_folder).name)


def _pinned(
    entry: ModelEntry,
    pin: dict[str, Any],
    config: dict[str, Any],
    tensors: tuple[TensorHeader, ...],
    name: str,
    files: CheckpointFiles,
) -> PinnedModel:
    shared = {name: getattr(entry, name) for name in ("trust_remote_code", "allow_pickle", "variant")}
    shared["mixture"] = any(".experts." in tensor.name or "mtp." in tensor.name for tensor in tensors)
    notes = []
    if files.other_checkpoints:
        taken = files.index or files.weights[0]
        notes.append(
            f"{name}: takes {taken}, as transformers does; also there: {', '.join(files.other_checkpoints[:3])}"
        )
    if said := summary(item for item in files.left_out if item[0] not in files.other_checkpoints):
        notes.append(f"{name}: left out: {said}")
    return PinnedModel(ModelPin(**pin, **shared), config, tensors, name, tuple(notes))


# ------------------------------------------------------------------------------------------------- folders


def _resolve_folder(entry: ModelEntry, folder: Path, workspace: Path | None, calibrated: bool) -> PinnedModel:
    what = f"models: {entry.id!r}"
    if not (folder / CONFIG).is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{what} has no config.json; name a transformers checkpoint")
    if workspace is not None and workspace.resolve().is_relative_to(folder):
        _check_workspace(what, folder, workspace.resolve())
    files = open_checkpoint(folder, what, variant=entry.variant, allow_pickle=entry.allow_pickle)
    config = parse_config(read_bounded(folder / CONFIG, CONFIG_BYTES, f"{what}: {CONFIG}"), what)
    names = () if files.pickled else files.weights
    tensors = tuple(header for name in names for header in read_header(folder / name))
    last = Path(entry.id).name
    # Some names mean a folder without naming it: "." and "..".
    id_ = entry.id if last not in ("", "..") else folder.name

    def head(name: str, count: int) -> bytes | None:
        return read_head(folder / name, count) if name in files.companions else None

    pin = {
        "id": id_,
        "revision": checkpoint_sha256(folder, files),
        "folder": str(folder),
        "adds_special_tokens": calibrated and adds_special_tokens(head),
    }
    return _pinned(entry, pin, config, tensors, entry.as_name or Path(id_).name, files)


def _check_workspace(what: str, folder: Path, workspace: Path) -> None:
    """Refuse an output folder that would become part of the model."""
    inside = workspace.relative_to(folder).parts
    if not any(folder_left_out(part) for part in inside):
        raise CheckpointError(
            f"{what}: --out {str(workspace)!r} lies in the model's folder, and would become part of it; name a folder "
            "outside of it"
        )


def read_header(path: Path) -> list[TensorHeader]:
    """List the tensors of a safetensors file from its header alone.

    Raises:
        CheckpointError: the file isn't safetensors, or its size isn't what its header says.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = path.stat().st_size
            if size < 8 or length > HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated or no safetensors file, got {size} bytes; complete its "
                    "download, or save it anew"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror}); mend its permissions") from error
    return parse_header(text, size - 8 - length, str(path))


# -------------------------------------------------------------------------------------------- repositories


def _resolve_repository(entry: ModelEntry, api: HfApi, silence: Silence | None, calibrated: bool) -> PinnedModel:
    what = f"models: {entry.id!r}"
    listed = insist(what, lambda: from_hub.list_files(api, entry.id, entry.revision), silence)
    if CONFIG not in listed.sizes and "adapter_config.json" not in listed.sizes:
        raise CheckpointError(f"{what} has no config.json; name a transformers checkpoint")

    def read(name: str) -> bytes:
        limit = from_hub.limit_of(name)
        found = insist(what, lambda: from_hub.read_file(api, entry.id, name, listed.commit, limit), silence)
        return found[0] if found else b""

    files = checkpoint_files(listed.sizes, read, what, variant=entry.variant, allow_pickle=entry.allow_pickle)
    config = parse_config(read(CONFIG), what)
    names = () if files.pickled else files.weights
    tensors = from_hub.read_headers(api, entry.id, names, listed.commit, lambda action: insist(what, action, silence))

    def head(name: str, count: int) -> bytes | None:
        if name not in files.companions:
            return None
        return insist(what, lambda: from_hub.read_range(api, entry.id, name, listed.commit, count)[0], silence)

    pin = {
        "id": entry.id,
        "revision": listed.commit,
        "endpoint": api.endpoint,
        "adds_special_tokens": calibrated and adds_special_tokens(head),
    }
    return _pinned(entry, pin, config, tensors, entry.as_name or Path(entry.id).name, files)


# ---------------------------------------------------------------------------------------------------- data


def pin_dataset(dataset: Dataset, zoo_folder: Path, where: str, silence: Silence | None = None) -> tuple[Dataset, str]:
    """Pin a data set: with absolute paths, or to a commit; returns it with the sha256 that identifies its content.

    Raises:
        CalibrationError: a file doesn't exist or can't be read.
    """
    if dataset.path not in BUILDERS and not (zoo_folder / dataset.path).exists():
        return _pin_remote_dataset(dataset, where, silence)
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


def pin_calibration(
    calibration: Calibration, special_tokens: SpecialTokens, zoo_folder: Path, silence: Silence | None = None
) -> tuple[Calibration, list[str]]:
    """A calibration with its data sets pinned, and the identities of their content.

    Raises: as ``pin_dataset``.
    """
    pinned = [
        pin_dataset(with_special_tokens(dataset, special_tokens), zoo_folder, calibration.where(index), silence)
        for index, dataset in enumerate(calibration.datasets)
    ]
    return calibration.with_datasets(tuple(dataset for dataset, _ in pinned)), [sha256 for _, sha256 in pinned]


def with_special_tokens(dataset: Dataset, otherwise: SpecialTokens) -> Dataset:
    """A data set that says how its sequences begin; ``otherwise`` is the zoo's word, for one that doesn't."""
    return dataset.model_copy(update={"special_tokens": dataset.special_tokens or otherwise})


def together(texts: Sequence[str]) -> str:
    """The identity of several data sets' contents; of one, its own."""
    return texts[0] if len(texts) == 1 else _sha256(list(texts))


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


def _pin_remote_dataset(dataset: Dataset, where: str, silence: Silence | None) -> tuple[Dataset, str]:
    api = hub.connect()
    thing = f"{where}: data set {dataset.path} on {api.endpoint}"

    def find() -> str:
        with hub.hub_errors(thing):
            return from_hub.checked_commit(api.dataset_info(dataset.path, revision=dataset.revision).sha, thing)

    commit = insist(thing, find, silence)
    pinned = dataset.model_copy(update={"revision": commit})
    return pinned, _sha256(pinned.model_dump(mode="json"))
