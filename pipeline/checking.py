"""``quantmill verify``: any checkpoint beside its reference, in a process of its own, and what a person reads of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.planning import sources
from pipeline.zoo import shipped
from pipeline.zoo.gating import Gate, Gates
from pipeline.zoo.problems import explain
from pipeline.zoo.zoo import ModelEntry
from workers import errors
from workers.errors import CheckpointError, ModelNotFound, QuantmillError, WorkerDied, ZooError
from workers.machine import child
from workers.machine.warm import Parents
from workers.spec.formats import recognised
from workers.spec.job import Dataset, Failure, ModelPin, ReasonCode, Thresholds, Verification
from workers.transfer import hub

# What is compared on if no text is named: the field's usual held-out text.
WIKITEXT = Dataset(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")


@dataclass(frozen=True)
class VerifyRequest:
    """What the command line asks for."""

    checkpoint: str
    reference: str
    text: Path | None
    tokens: int
    sequence_length: int
    gates: Path | None
    trust_remote_code: bool
    allow_pickle: bool
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None


def check(asked: VerifyRequest, out: Path) -> tuple[dict[str, Any], Thresholds, str]:
    """Verify a checkpoint: the report (``workers.verify.foreign.CheckReport`` as JSON), its thresholds and family.

    With tasks for lm-eval the report has their ``scores`` too, which decide nothing.

    Raises:
        QuantmillError: what isn't the checkpoint's fault.
    """
    with closing(Parents()) as parents:
        # It imports while models and text are looked for.
        warm, _ = parents.address()
        return _check(asked, out, warm)


def _check(asked: VerifyRequest, out: Path, warm: str | None) -> tuple[dict[str, Any], Thresholds, str]:
    entry = ModelEntry(
        id=asked.reference.partition("@")[0],
        revision=asked.reference.partition("@")[2] or "main",
        trust_remote_code=asked.trust_remote_code,
        allow_pickle=asked.allow_pickle,
    )
    folder = _checkpoint(asked.checkpoint)
    family = declared_family(_quantization(folder))
    thresholds = _thresholds(family, asked.gates)
    pin = sources.resolve(entry, Path.cwd()).pin
    if pin.folder is None:
        fetched = hub.fetch(hub.connect(pin.endpoint), pin.id, pin.revision, pin.allow_pickle)
        pin = pin.model_copy(update={"folder": str(fetched)})
    text = Dataset(path="text", data_files=(str(asked.text),)) if asked.text else WIKITEXT
    dataset, data = sources.pin_dataset(text, Path.cwd(), "--text")
    verification = Verification(dataset=dataset, data=data, tokens=asked.tokens, sequence_length=asked.sequence_length)
    out.mkdir(parents=True, exist_ok=True)
    report = _ask("workers.verify.foreign", _request(folder, pin, verification, thresholds, out.resolve()), warm)
    if asked.tasks:
        report["scores"] = _ask("workers.verify.harness", _evaluation(asked, folder, pin), warm)["scores"]
    return report, thresholds, family


def _evaluation(asked: VerifyRequest, folder: Path, pin: ModelPin) -> dict[str, Any]:
    return {
        "models": [pin.folder, str(folder)],
        "tasks": asked.tasks,
        "include": str(asked.task_folder.resolve()) if asked.task_folder else None,
        "limit": asked.limit,
        "trust_remote_code": asked.trust_remote_code,
    }


def _request(
    folder: Path, pin: ModelPin, verification: Verification, thresholds: Thresholds, out: Path
) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "reference": pin.model_dump(),
        "verification": verification.model_dump(),
        "thresholds": thresholds.model_dump(),
        "workspace": str(out),
    }


def _ask(module: str, request: Mapping[str, Any], warm: str | None) -> dict[str, Any]:
    """The answer of a process of its own."""
    asked = TypeAdapter(dict[str, Any]).dump_json(dict(request)).decode()
    done = child.run(f"{module}:answer", asked, warm=warm)
    if done.answer is None:
        raise WorkerDied(f"{module}: the process ended with {done.code} ({done.said})")
    report: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(done.answer)
    if report["failure"] is not None:
        raise _error(Failure.model_validate(report["failure"]))
    return report


def _error(failure: Failure) -> QuantmillError:
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, QuantmillError):
        return kind(failure.message)
    return QuantmillError(f"{failure.kind}: {failure.message}\n{failure.traceback}")


def _checkpoint(said: str) -> Path:
    """A folder, or a repository's, fetched."""
    folder = Path(said)
    if folder.is_dir():
        return folder.resolve()
    name, _, revision = said.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"verify: no such folder, got {said!r}; give a folder, or a Hub repository as org/name")
    return hub.fetch(hub.connect(), name, revision or "main", allow_pickle=False)


def _quantization(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"verify {folder}: no readable config.json ({error})") from error
    return found or {}


def declared_family(config: Mapping[str, Any]) -> str:
    """The family of gates for what a ``quantization_config`` declares; w8 for a checkpoint that declares nothing."""
    if not config.get("quant_method"):
        return "w8"
    row = recognised(config)
    known = shipped.gates()["default"]
    families = row.family(config) if row else ["w4"]
    if unknown := [family for family in families if family not in known]:
        return unknown[0]
    # Of mixed precision the coarsest part sets what can be expected.
    return min(families, key=lambda family: known[family].top1_agreement, default="w8")


def _thresholds(family: str, said: Path | None) -> Thresholds:
    known = shipped.gates()["default"]
    if family not in known:
        raise ZooError(f"verify: no gates for the family {family!r}; configs/gates.yaml has {', '.join(sorted(known))}")
    if said is None:
        return known[family]
    try:
        content = yaml.safe_load(said.read_text()) or {}
        gates = TypeAdapter(Gates).validate_python(content)
    except ValidationError as error:
        raise ZooError(explain(error, str(said), content)) from error
    except (OSError, yaml.YAMLError) as error:
        raise ZooError(f"--gates: not a readable YAML file, got {str(said)!r} ({error})") from error
    chosen = gates.get(family, Gate())
    return known[family].model_copy(update=chosen.model_dump(exclude_none=True))


def rows(report: Mapping[str, Any], thresholds: Thresholds) -> list[dict[str, str]]:
    """The table that a person reads: what was looked at, what was found, what is expected."""
    verdict = report["verdict"]
    codes = [ReasonCode(code) for code in verdict.get("codes", ())]
    broken = codes.count(ReasonCode.INTEGRITY)
    found = [_row("integrity", "ok" if not broken else f"{broken} problem(s), see below", "", not broken)]
    if report["bytes"]:
        size = f"{report['bytes'] / 1e6:.1f} MB of {report['reference_bytes'] / 1e6:.1f} MB"
        found.append(_row("quantized", f"{report['quantized']} of {report['linear']} linear layers, {size}", "", True))
    metrics = verdict["metrics"]
    if metrics:
        found += _measured(metrics, thresholds, codes)
    runtime = verdict["runtime"]
    refused = {ReasonCode.RUNTIME, ReasonCode.RUNTIME_LOGITS} & set(codes)
    if runtime:
        said = f"{runtime['name']} {runtime['version']}, logits differ by {runtime['relative_logit_difference']:.2g}"
        found.append(_row("runtime", said, f"<= {thresholds.runtime_logit_difference:g} deviations", not refused))
    elif refused:
        found.append(_row("runtime", "see below", "", False))
    for key, decibels in verdict["worst_layers"]:
        found.append(_row("noisiest", f"{key.removesuffix('.weight')}, {decibels:.1f} dB", "", True))
    for index, made in enumerate(verdict["generations"], 1):
        same = f"{made['same_tokens']} of {made['tokens']} tokens as the reference"
        found.append(_row(f"goes on, {index}", same, "", True))
        found.append(_row("  after", repr(made["prompt"][-60:]), "", True))
        found.append(_row("  it", repr(made["artifact"]), "", True))
        found.append(_row("  reference", repr(made["reference"]), "", True))
    return found


def score_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """lm-eval's metrics of the reference and of the checkpoint, side by side."""

    def figure(value: float, error: float | None) -> str:
        return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"

    return [
        {
            "task": score["task"],
            "metric": score["metric"],
            "reference": figure(score["values"][0], score["errors"][0]),
            "checkpoint": figure(score["values"][1], score["errors"][1]),
        }
        for score in report.get("scores", ())
    ]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What a table has no room for: what is worth knowing, and every reason."""
    notes = [f"note: {line.removeprefix('integrity: ')}" for line in report["notes"]]
    return [*notes, *report["verdict"]["reasons"]]


def _measured(metrics: Mapping[str, Any], bounds: Thresholds, codes: list[ReasonCode]) -> list[dict[str, str]]:
    ratio = metrics["perplexity"] / metrics["reference_perplexity"]
    interval = f"[{float(metrics['perplexity_ratio_lower']):.4f}, {float(metrics['perplexity_ratio_upper']):.4f}]"
    kl_bound = f"95 % bound {float(metrics['kl_mean_upper']):.5f}; p99 {metrics['kl_p99']:.4f}"
    return [
        _row(
            "KL divergence",
            f"{metrics['kl_mean']:.5f} nats ({kl_bound})",
            f"<= {bounds.kl_mean:g}",
            ReasonCode.KL not in codes,
        ),
        _row(
            "top-1 agreement",
            f"{metrics['top1_agreement']:.4f} (95 % bound {metrics['top1_agreement_lower']:.4f})",
            f">= {bounds.top1_agreement:g}",
            ReasonCode.TOP1 not in codes,
        ),
        _row(
            "perplexity",
            f"{metrics['perplexity']:.4f} of {metrics['reference_perplexity']:.4f}, {ratio:.4f} times {interval}",
            f"<= {bounds.perplexity_ratio:g} times",
            ReasonCode.PERPLEXITY not in codes,
        ),
        _row("tokens", str(metrics["eval_tokens"]), "", ReasonCode.EVAL_TOKENS not in codes),
    ]


def _row(what: str, found: str, expected: str, kept: bool) -> dict[str, str]:
    return {"": "" if kept else "!", "what": what, "found": found, "expected": expected}
