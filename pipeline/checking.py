"""Implement ``quantmill verify``: check any checkpoint against its reference in a subprocess, and format the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.planning import sources
from pipeline.zoo import shipped
from pipeline.zoo.gating import Gate, Gates
from pipeline.zoo.problems import explain
from pipeline.zoo.zoo import ModelEntry, read_yaml
from workers import errors
from workers.errors import CheckpointError, ModelNotFound, QuantmillError, ZooError
from workers.machine import child
from workers.machine.environments import interpreter
from workers.machine.failures import of_a_process
from workers.machine.warm import VERIFY_MODULES, Parents
from workers.spec.data import Dataset, Verification
from workers.spec.formats import BITSANDBYTES, recognised
from workers.spec.job import Failure, ModelPin, ReasonCode, RuntimeAgreement, Thresholds
from workers.spec.runtimes import runtime_named
from workers.transfer import from_hub, hub

# Default text to compare on: the test split of WikiText-2.
WIKITEXT = Dataset(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")


@dataclass(frozen=True)
class VerifyRequest:
    """The options of ``quantmill verify``."""

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
    runtimes: tuple[str, ...] = ()


def check(request: VerifyRequest, out: Path) -> tuple[dict[str, Any], Thresholds, str]:
    """Verify a checkpoint; returns the report (``workers.verify.foreign.CheckReport`` as JSON), thresholds and family.

    With lm-eval tasks the report also has their ``scores``, which don't affect the verdict.

    Raises:
        QuantmillError: verification couldn't run, for a reason other than a bad checkpoint.
    """
    with closing(Parents(_modules(request.checkpoint))) as parents:
        # The warm parent imports while models and text are fetched.
        warm, _ = parents.address()
        return _check(request, out, warm)


def _modules(checkpoint: str) -> tuple[str, ...] | None:
    """Modules to preload: without those of bitsandbytes (a second of imports) for a folder in another format."""
    config = Path(checkpoint, "config.json")
    if not config.is_file() or recognised(quantization_of(config.parent)) is BITSANDBYTES:
        return None
    return VERIFY_MODULES


def _check(request: VerifyRequest, out: Path, warm: str | None) -> tuple[dict[str, Any], Thresholds, str]:
    entry = ModelEntry(
        id=request.reference.partition("@")[0],
        revision=request.reference.partition("@")[2] or "main",
        trust_remote_code=request.trust_remote_code,
        allow_pickle=request.allow_pickle,
    )
    runtimes = _runtimes(request.runtimes)
    folder = checkpoint_folder(request.checkpoint)
    family = declared_family(quantization_of(folder))
    thresholds = _thresholds(family, request.gates)
    pin = sources.resolve(entry, Path.cwd()).pin
    if pin.folder is None:
        fetched = from_hub.fetch(hub.connect(pin.endpoint), pin.id, pin.revision, pin.allow_pickle)
        pin = pin.model_copy(update={"folder": str(fetched)})
    text = Dataset(path="text", data_files=(str(request.text),)) if request.text else WIKITEXT
    dataset, data = sources.pin_dataset(text, Path.cwd(), "--text")
    verification = Verification(
        dataset=dataset, data=data, tokens=request.tokens, sequence_length=request.sequence_length
    )
    out.mkdir(parents=True, exist_ok=True)
    asked = {**_request(folder, pin, verification, thresholds, out.resolve()), "runtimes": runtimes}
    report = ask("workers.verify.foreign", asked, warm)
    if request.tasks:
        report["scores"] = ask("workers.verify.harness", _evaluation(request, folder, pin), warm)["scores"]
    return report, thresholds, family


def _runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """The runtimes of these names, whose environments are here.

    Raises:
        ZooError: no runtime of a name is known.
        PreflightError: an environment isn't built on this machine.
    """
    try:
        rows = [runtime_named(name) for name in names]
    except ValueError as error:
        raise ZooError(f"--runtime: {error}") from error
    for row in rows:
        if row.environment is not None:
            interpreter(row.environment)
    return tuple(dict.fromkeys(row.name for row in rows))


def _evaluation(request: VerifyRequest, folder: Path, pin: ModelPin) -> dict[str, Any]:
    return {
        "models": [pin.folder, str(folder)],
        "tasks": request.tasks,
        "include": str(request.task_folder.resolve()) if request.task_folder else None,
        "limit": request.limit,
        "trust_remote_code": request.trust_remote_code,
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


def ask(module: str, request: Mapping[str, Any], warm: str | None) -> dict[str, Any]:
    """Run a module's ``answer`` in a subprocess, and return its report."""
    content = TypeAdapter(dict[str, Any]).dump_json(dict(request)).decode()
    ended = child.run(f"{module}:answer", content, warm=warm)
    if ended.answer is None:
        raise of_a_process(module, ended)
    report: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(ended.answer)
    if report["failure"] is not None:
        raise _error(Failure.model_validate(report["failure"]))
    return report


def _error(failure: Failure) -> QuantmillError:
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, QuantmillError):
        return kind(failure.message)
    return QuantmillError(f"{failure.kind}: {failure.message}\n{failure.traceback}")


def checkpoint_folder(checkpoint: str) -> Path:
    """The checkpoint's folder; a Hub repository is fetched first.

    Raises:
        ModelNotFound: there is no such folder, nor repository.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder.resolve()
    name, _, revision = checkpoint.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"no such folder, got {checkpoint!r}; give a folder, or a Hub repository as org/name")
    return from_hub.fetch(hub.connect(), name, revision or "main", allow_pickle=False)


def quantization_of(folder: Path) -> Mapping[str, Any]:
    """The ``quantization_config`` of a checkpoint; empty if it has none.

    Raises:
        CheckpointError: config.json can't be read.
    """
    try:
        declared = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable config.json ({error})") from error
    return declared or {}


def declared_family(config: Mapping[str, Any]) -> str:
    """The gates' family for a ``quantization_config``; w8 for a checkpoint without one."""
    row = recognised(config)
    if row is None and not config.get("quant_method"):
        return "w8"
    known = shipped.gates()["default"]
    families = row.family(config) if row else ["w4"]
    if unknown := [family for family in families if family not in known]:
        return unknown[0]
    # With mixed precision the coarsest part limits quality: use the loosest gates.
    return min(families, key=lambda family: known[family].top1_agreement, default="w8")


def _thresholds(family: str, path: Path | None) -> Thresholds:
    known = shipped.gates()["default"]
    if family not in known:
        raise ZooError(f"verify: no gates for the family {family!r}; configs/gates.yaml has {', '.join(sorted(known))}")
    if path is None:
        return known[family]
    try:
        content = read_yaml(path) or {}
        gates = TypeAdapter(Gates).validate_python(content)
    except ValidationError as error:
        raise ZooError(explain(error, str(path), content)) from error
    except ZooError as error:
        raise ZooError(f"--gates: {error}") from error
    chosen = gates.get(family, Gate())
    return known[family].model_copy(update=chosen.model_dump(exclude_none=True))


def rows(report: Mapping[str, Any], thresholds: Thresholds) -> list[dict[str, str]]:
    """The rows of the printed table: what was checked, what was found, what is expected."""
    verdict = report["verdict"]
    codes = [ReasonCode(code) for code in verdict.get("codes", ())]
    broken = codes.count(ReasonCode.INTEGRITY)
    table = [_row("integrity", "ok" if not broken else f"{broken} problem(s), see below", "", not broken)]
    if report["bytes"]:
        size = f"{report['bytes'] / 1e6:.1f} MB of {report['reference_bytes'] / 1e6:.1f} MB"
        table.append(_row("quantized", f"{report['quantized']} of {report['linear']} linear layers, {size}", "", True))
    metrics = verdict["metrics"]
    if metrics:
        table += _measured(metrics, thresholds, codes)
    refused = {ReasonCode.RUNTIME, ReasonCode.RUNTIME_LOGITS} & set(codes)
    runtimes = [RuntimeAgreement.model_validate(found) for found in agreements(verdict)]
    for runtime in runtimes:
        description = f"{runtime.said}, logits differ by {runtime.relative_logit_difference:.2g}"
        table.append(
            _row("runtime", description, f"<= {thresholds.runtime_logit_difference:g} deviations", not refused)
        )
    if refused and not runtimes:
        table.append(_row("runtime", "see below", "", False))
    for key, decibels in verdict["worst_layers"]:
        table.append(_row("noisiest", f"{key.removesuffix('.weight')}, {decibels:.1f} dB", "", True))
    for index, generation in enumerate(verdict["generations"], 1):
        matching = f"{generation['same_tokens']} of {generation['tokens']} tokens as the reference"
        table.append(_row(f"goes on, {index}", matching, "", True))
        table.append(_row("  after", repr(generation["prompt"][-60:]), "", True))
        table.append(_row("  it", repr(generation["artifact"]), "", True))
        table.append(_row("  reference", repr(generation["reference"]), "", True))
    return table


def agreements(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runtimes whose logits were compared."""
    first = verdict["runtime"]
    return [*([first] if first else ()), *verdict.get("other_runtimes", ())]


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
    """The lines below the table: notes, and every reason of the verdict."""
    notes = [f"note: {line.removeprefix('integrity: ')}" for line in report["notes"]]
    notes += [
        f"note: {runtime['name']}: its own loader ran, and PyTorch computed with what it loaded; its kernels don't run "
        f"on this processor ({runtime['kernels']})"
        for runtime in agreements(report["verdict"])
        if runtime.get("kernels")
    ]
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


def _row(what: str, measured: str, expected: str, passed: bool) -> dict[str, str]:
    return {"": "" if passed else "!", "what": what, "found": measured, "expected": expected}
