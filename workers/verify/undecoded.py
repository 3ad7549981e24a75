"""Verifies artifacts that quantmill has no decoder for: files by their headers, predictions by the runtime's own.

The runtime's process leaves the logits of all held-out text; their divergence from the reference's is measured as for
every other artifact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from workers.checkpoint.source import Header, ModelSource, Source
from workers.formats.folded import Folded
from workers.spec.runtimes import TRANSFORMERS
from workers.spec.workspace import LOGITS_ROWS
from workers.verify import gates
from workers.verify.comparison import RUNTIME_SEQUENCES, RUNTIME_TOKENS, Comparison
from workers.verify.integrity import Findings, companions_of, listed, settings_of
from workers.verify.runtimes.transformers import HELD_OUT

NOTE = (
    "measured by transformers' own predictions, in the checkpoint's dtype: quantmill has no decoder for this quantizer"
)


def inspect(
    source: Folded | ModelSource, folder: Path, intended: frozenset[str], unused: frozenset[str] = frozenset()
) -> Findings:
    """Compare an artifact's files with its source's: what isn't quantized is the same, what is has other tensors.

    ``intended`` names the modules that should be quantized; ``unused`` are tensors that artifacts may leave out.
    """
    findings = Findings([*settings_of(source.folder, folder), *companions_of(source, folder)])
    problems = findings.problems
    with Source(folder) as stored:
        parts = _parts(stored.headers, intended)
        weights = {f"{module}.weight" for module in intended}
        plain = [key for key in weights if key in stored.headers and _alike(source.headers[key], stored.headers[key])]
        problems += listed("not quantized though the recipe says so", plain)
        problems += listed("quantized modules without a tensor", [name for name, keys in parts.items() if not keys])
        known = {key for keys in parts.values() for key in keys}
        problems += listed("tensors that the source doesn't have", set(stored.headers) - set(source.headers) - known)
        problems += listed("tensors missing", _missing(source, stored, weights | unused))
        for key in sorted(set(stored.headers) & (set(source.headers) - weights)):
            if not torch.equal(stored.read(key), source.read(key).to(stored.headers[key].dtype)):
                problems.append(f"integrity: {key} isn't quantized, but differs from the source's")
        broken = [key for key in sorted(known) if not _finite(stored.read(key))]
        problems += listed("NaN or Inf in", broken)
        if stored.bytes >= source.bytes:
            problems.append(f"integrity: {stored.bytes} bytes of weights, not smaller than the source's {source.bytes}")
    return findings


def _parts(headers: dict[str, Header], intended: frozenset[str]) -> dict[str, list[str]]:
    """The stored tensors of each quantized module, but its bias."""
    found: dict[str, list[str]] = {module: [] for module in intended}
    for key in headers:
        names = key.split(".")
        for end in range(len(names) - 1, 0, -1):
            if (module := ".".join(names[:end])) in found and names[end] != "bias":
                found[module].append(key)
                break
    return found


def _alike(one: Header, other: Header) -> bool:
    return one.shape == other.shape and other.dtype.is_floating_point and other.dtype.itemsize > 1


def _missing(source: Folded | ModelSource, stored: Source, others: set[str]) -> Iterator[str]:
    """Tensors that the artifact lacks; a tied one, equal to another of its shape that it has, may be."""
    for key in set(source.headers) - set(stored.headers) - others:
        same = (name for name in stored.headers if name in source.headers and _same(source, name, key))
        if next(same, None) is None:
            yield key


def _same(source: Folded | ModelSource, one: str, other: str) -> bool:
    alike = source.headers[one].shape == source.headers[other].shape
    return alike and torch.equal(source.read(one), source.read(other))


def _finite(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor.float()).all())


def measure(comparison: Comparison, folder: Path, problems: list[str]) -> gates.Evidence:
    """Evidence from the runtime's own predictions on all held-out text; ``problems`` are those of the files."""
    with comparison.scratch() as scratch:
        answer = comparison.ask_one(TRANSFORMERS, folder, scratch, held_out=True)
        if answer.logits is None:
            return gates.Evidence(integrity=problems, runtime_problems=answer.problems, infeasible=answer.infeasible)
        files = [Path(scratch, HELD_OUT.format(index)) for index in range(len(comparison.tokens))]
        # The same text once more, as the beginning of longer sequences: logits don't depend on what follows.
        again = torch.stack([load_file(path)["logits"][:RUNTIME_TOKENS].float() for path in files[:RUNTIME_SEQUENCES]])
        agreement, found = comparison.agreement(answer, again)
        metrics = comparison.metrics((_in_pieces(path) for path in files), len(files))
    return gates.Evidence(
        integrity=problems,
        runtime_problems=found,
        infeasible=answer.infeasible,
        metrics=metrics,
        runtime=agreement,
        generations=comparison.generations(answer),
        promised_tokens=comparison.verification.tokens,
    )


def _in_pieces(path: Path) -> tuple[Tensor, ...]:
    """The logits of a file, float32 [T, V], in pieces of ``LOGITS_ROWS`` rows."""
    logits_TV: Tensor = load_file(path)["logits"].float()
    return torch.split(logits_TV, LOGITS_ROWS)
