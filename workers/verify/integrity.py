"""Checks integrity: compares the artifact's files with the source's, tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import ModelSource, Source
from workers.formats.decoded import Decoded
from workers.formats.folded import Folded
from workers.machine.files import file_sha256, open_checkpoint
from workers.model.generation import GENERATION_CONFIG, unreadable
from workers.spec.checkpoint_files import REPLACED
from workers.spec.formats import recognised
from workers.spec.ggml import is_beside
from workers.verify.diagnosis import diagnose

NAMED = 3  # names listed in a message
# The first number in a weight's name is its layer's.
_LAYER = re.compile(r"\.(\d+)\.")
# Settings that a quantizer writes into config.json.
QUANTIZERS_OWN = frozenset(
    {"quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version"}
)
# Maximum number of source weights that a broken weight is compared with.
CANDIDATES = 256


@dataclass
class Findings:
    """Problems, notes, and each quantized weight's SQNR to its source in dB, by key."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[tuple[str, float], ...]:
        """The three weights with the lowest SQNR, in dB."""
        return tuple(sorted(self.sqnr.items(), key=lambda item: item[1])[:3])

    @property
    def by_layer(self) -> tuple[float | None, ...]:
        """The lowest SQNR of each layer's weights, in dB to a hundredth, by the layer's number; None: nothing was lost.

        Weights outside of numbered layers (embeddings, the head) aren't among them.
        """
        lowest: dict[int, float] = {}
        for key, decibels in self.sqnr.items():
            if (number := _LAYER.search(key)) and math.isfinite(decibels):
                layer = int(number[1])
                lowest[layer] = min(decibels, lowest.get(layer, math.inf))
        found = (lowest.get(layer) for layer in range(max(lowest, default=-1) + 1))
        return tuple(None if each is None else round(each, 2) for each in found)


def inspect(
    source: Folded,
    artifact: Source | Decoded,
    folder: Path,
    intended: frozenset[str],
    unused: frozenset[str] = frozenset(),
    exact: Callable[[str], Tensor | None] | None = None,
) -> Findings:
    """Compare one of our artifacts with its source, under the scales folded into it.

    ``exact`` gives the weights (float32) of a source that is quantized already, whose codes the artifact keeps.
    ``intended`` names the modules that should be quantized; ``unused`` are tensors of the source without a place in the
    model, which artifacts leave out. Every tensor of both is read once.
    """
    quantized = artifact.quantized if isinstance(artifact, Decoded) else frozenset[str]()
    findings = Findings(
        [
            *listed("not quantized though the recipe says so", intended - quantized),
            *listed("quantized though the recipe doesn't say so", quantized - intended),
            *settings_of(source.folder, folder),
            *companions_of(source, folder),
        ]
    )
    compare(source, artifact, quantized, findings, unused)
    if exact is not None:
        findings.problems += _not_kept(exact, artifact, quantized)
    return findings


def _not_kept(
    exact: Callable[[str], Tensor | None], artifact: Source | Decoded, quantized: frozenset[str]
) -> list[str]:
    """Weights that aren't bit for bit those that the source's codes stand for, in the dtype of the artifact."""
    changed = []
    for key in (f"{module}.weight" for module in sorted(quantized) if f"{module}.weight" in artifact.headers):
        want, got = exact(key), artifact.read(key)
        if want is None or not torch.equal(want.to(got.device, got.dtype), got):
            changed.append(key)
    return listed("other weights than the codes of the source stand for", changed)


def compare(
    source: Folded | ModelSource,
    artifact: Source | Decoded,
    quantized: frozenset[str],
    findings: Findings,
    unused: frozenset[str] = frozenset(),
    *,
    ours: bool = True,
) -> None:
    """Compare all tensors; the artifact may lack ``unused`` ones.

    In a checkpoint of another tool (``ours`` false), tensors that aren't quantized may differ: other tools fold scales
    into norms without recording it. The weights' SQNR is then meaningless.
    """
    findings.problems += listed("tensors missing", set(source.headers) - set(artifact.headers) - unused)
    findings.problems += listed("tensors that the source doesn't have", set(artifact.headers) - set(source.headers))
    if artifact.bytes >= source.bytes and quantized:
        findings.problems.append(
            f"integrity: {artifact.bytes} bytes of weights, not smaller than the source's {source.bytes}"
        )
    changed: list[str] = []
    weights: list[str] = []
    for key in source.headers:
        if key not in artifact.headers:
            continue
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and module in quantized:
            weights.append(key)
        elif _differs(source, artifact, key, findings.problems):
            changed.append(key)
    if ours:
        findings.problems += [f"integrity: {key} isn't quantized, but differs from the source's" for key in changed]
    elif changed:
        findings.notes += listed("not quantized, but other than the source's (folded scales?)", changed)
    for key in weights:
        _check_weight(source, artifact, key, findings, comparable=ours or not changed)


def _differs(source: Folded | ModelSource, artifact: Source | Decoded, key: str, problems: list[str]) -> bool:
    if not _same_shape(source, artifact, key, problems):
        return False
    ours, theirs = artifact.read(key), source.read(key)
    _finite(key, ours, problems)
    theirs = artifact.as_stored(key, theirs) if isinstance(artifact, Decoded) else theirs
    return ours.dtype != theirs.dtype or not torch.equal(ours, theirs)


def _check_weight(
    source: Folded | ModelSource, artifact: Source | Decoded, key: str, findings: Findings, *, comparable: bool
) -> None:
    """Measure a quantized weight's SQNR, and diagnose its fault."""
    if not _same_shape(source, artifact, key, findings.problems):
        return
    ours = artifact.read(key)
    if not _finite(key, ours, findings.problems) or not comparable:
        return
    verdict = diagnose(source.read(key).to(ours.device), ours, partial(_siblings, source, key))
    findings.sqnr[key] = verdict.sqnr
    if verdict.fault:
        findings.problems.append(f"integrity: {key}: {verdict.fault}")


def _same_shape(source: Folded | ModelSource, artifact: Source | Decoded, key: str, problems: list[str]) -> bool:
    want, got = source.headers[key].shape, artifact.headers[key].shape
    if want != got:
        problems.append(f"integrity: {key} has the shape {got}, expected {want}")
    return want == got


def _finite(key: str, tensor: Tensor, problems: list[str]) -> bool:
    finite = bool(torch.isfinite(tensor).all())
    if not finite:
        problems.append(f"integrity: NaN or Inf in {key}")
    return finite


def _siblings(source: Folded | ModelSource, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the same weight of other layers and experts, then weights of the same shape, its own layer's first."""
    shape, kind = source.headers[key].shape, _kind(key)
    layer = re.split(r"(?<=\.\d)\.", key)[0]
    alike = [name for name, header in source.headers.items() if header.shape == shape and name != key]
    alike.sort(key=lambda name: (_kind(name) != kind, not name.startswith(layer)))
    for name in alike[:CANDIDATES]:
        yield name, source.read(name)


def _kind(key: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", key)


def listed(what: str, names: Iterable[str]) -> list[str]:
    """A problem that lists the names; empty if there are none."""
    sorted_names = sorted(names)
    if not sorted_names:
        return []
    more = f" and {len(sorted_names) - NAMED} more" if len(sorted_names) > NAMED else ""
    return [f"integrity: {what}: {', '.join(sorted_names[:NAMED])}{more}"]


def settings_of(source: Path, artifact: Path) -> list[str]:
    """Compare config.json with the source's, except what quantizers write."""
    try:
        want, got = (json.loads((folder / "config.json").read_text()) for folder in (source, artifact))
    except (OSError, ValueError) as error:
        return [f"integrity: config.json can't be read ({error})"]
    declared = got.get("quantization_config")
    row = recognised(declared) if isinstance(declared, dict) else None
    added = row.settings({**want, "quantization_config": declared}) if row else {}
    return differing_settings("config.json", {**want, **added}, got, QUANTIZERS_OWN | {"transformers_weights"})


def differing_settings(
    where: str,
    want: Mapping[str, Any],
    got: Mapping[str, Any],
    ignored: frozenset[str] = frozenset(),
    same: Callable[[Any, Any], bool] = lambda a, b: a == b,
) -> list[str]:
    """A problem that names the differing settings of two mappings."""
    missing = object()
    keys = sorted((set(want) | set(got)) - ignored)
    differing = [key for key in keys if not same(want.get(key, missing), got.get(key, missing))]
    differences = [f"{key} ({got.get(key, 'missing')!r}, expected {want.get(key, 'nothing')!r})" for key in differing]
    return listed(f"{where} differs from the source's", differences)


def companions_of(source: Folded | ModelSource, artifact: Path) -> list[str]:
    """Check tokenizer, templates, generation config and licence: present, byte-identical, and no further files."""
    missing, changed = [], []
    expected = {Path(name) for name in source.files.companions}
    if unreadable(source.folder):
        expected.discard(Path(GENERATION_CONFIG))
    for path in sorted(expected):
        if not (artifact / path).is_file():
            missing.append(str(path))
        elif file_sha256(source.folder / path) != file_sha256(artifact / path):
            changed.append(str(path))
    return [
        *listed("files of the source missing", missing),
        *listed("files that differ from the source's", changed),
        *listed("files that the source doesn't have", _strangers(artifact, expected)),
    ]


def _strangers(artifact: Path, expected: set[Path]) -> Iterator[str]:
    """Files that a loader may read: neither the source's, nor the checked safetensors."""
    files = open_checkpoint(artifact, f"checkpoint {artifact}")
    checked = {*files.weights, files.index, *map(str, expected), *REPLACED}
    for path in sorted(artifact.rglob("*")):
        relative = path.relative_to(artifact)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and str(relative) not in checked and not is_beside(str(relative)):
            yield str(relative)
