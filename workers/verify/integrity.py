"""Integrity: the artifact's files against the source's, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.checkpoint import Source, companion_files
from workers.content import file_sha256
from workers.formats.decoded import Decoded
from workers.formats.folded import Folded
from workers.numerics.divergence import sqnr_db

NAMED = 3  # of many, in a message


@dataclass(frozen=True)
class Findings:
    """What is wrong, and how far each quantized weight is from its source, by checkpoint key, in dB."""

    problems: tuple[str, ...]
    sqnr: dict[str, float]

    @property
    def worst(self) -> tuple[tuple[str, float], ...]:
        """The three weights with the least signal to noise."""
        return tuple(sorted(self.sqnr.items(), key=lambda item: item[1])[:3])


def inspect(source: Folded, artifact: Source | Decoded, folder: Path, intended: frozenset[str]) -> Findings:
    """Compare an artifact with its source, under the scales that were folded into it.

    ``intended`` names the modules that are to be quantized. Every tensor of both is read once.
    """
    quantized = artifact.quantized if isinstance(artifact, Decoded) else frozenset[str]()
    problems = [
        *_listed("not quantized though the recipe says so", intended - quantized),
        *_listed("quantized though the recipe doesn't say so", quantized - intended),
        *_listed("tensors missing", set(source.headers) - set(artifact.headers)),
        *_listed("tensors that the source doesn't have", set(artifact.headers) - set(source.headers)),
        *_companions(source.folder, folder),
    ]
    if artifact.bytes >= source.bytes and quantized:
        problems.append(f"integrity: {artifact.bytes} bytes of weights, not smaller than the source's {source.bytes}")
    sqnr = {}
    for key in source.headers:
        if key in artifact.headers:
            ratio = _compare(source, artifact, key, key.rpartition(".")[0] in quantized, problems)
            if ratio is not None:
                sqnr[key] = ratio
    return Findings(tuple(problems), sqnr)


def _compare(
    source: Folded, artifact: Source | Decoded, key: str, quantized: bool, problems: list[str]
) -> float | None:
    """SQNR of a quantized weight; None for a tensor that has to be the source's own."""
    want, got = source.headers[key].shape, artifact.headers[key].shape
    if want != got:
        problems.append(f"integrity: {key} has the shape {got}, expected {want}")
        return None
    ours, theirs = artifact.read(key), source.read(key)
    if not bool(torch.isfinite(ours).all()):
        problems.append(f"integrity: NaN or Inf in {key}")
    if quantized:
        return sqnr_db(theirs, ours)
    if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
        problems.append(f"integrity: {key} isn't quantized, but differs from the source's")
    return None


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return [f"integrity: {what}: {', '.join(found[:NAMED])}{more}"]


def _companions(source: Path, artifact: Path) -> list[str]:
    """Tokenizer, templates, generation config, licence: there, and equal by bytes."""
    missing, changed = [], []
    for path in companion_files(source):
        if not (artifact / path).is_file():
            missing.append(str(path))
        elif file_sha256(source / path) != file_sha256(artifact / path):
            changed.append(str(path))
    return [*_listed("files of the source missing", missing), *_listed("files that differ from the source's", changed)]
