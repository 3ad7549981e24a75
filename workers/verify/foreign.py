"""Verifies a checkpoint that other tools may have made; ``answer`` is called in a fresh process.

A separate process, because the command line never loads torch. Other tools rewrite companion files and fold scales into
norms without recording it, so files are compared by meaning, and weights by the model's predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from workers.checkpoint.source import Source
from workers.errors import CheckpointError, NumericalError, UnsupportedRecipe, UserError
from workers.formats.decoded import Decoded, open_decoded
from workers.machine.failures import describe
from workers.model.device import compute_device
from workers.model.generation import GENERATION_CONFIG, unreadable
from workers.model.loading import read_config
from workers.spec.base import Frozen
from workers.spec.data import Verification
from workers.spec.formats import HF_QUANTIZER, recognised
from workers.spec.job import Failure, ModelPin, Thresholds, Verdict
from workers.spec.workspace import MANIFEST
from workers.transfer import artifact
from workers.verify import gates, undecoded
from workers.verify.comparison import Comparison
from workers.verify.integrity import QUANTIZERS_OWN, Findings, compare, differing_settings, listed

# Settings that a tool may change on saving a checkpoint without changing the model.
UNSAID = QUANTIZERS_OWN | {"quantization", "_name_or_path", "use_cache", "_attn_implementation_autoset"}
SAMPLE_TOKENS = 2048


class CheckRequest(Frozen):
    """A checkpoint and its reference (downloaded folders), the text, and the thresholds."""

    checkpoint: str
    reference: ModelPin = Field(description="With its folder.")
    verification: Verification
    thresholds: Thresholds
    workspace: str
    runtimes: tuple[str, ...] = Field((), description="Runtimes that check it; empty: the one of its format.")


class CheckReport(Frozen):
    """Result of a check."""

    verdict: Verdict | None = None
    notes: tuple[str, ...] = ()
    quantized: int = 0
    linear: int = Field(0, description="Linear layers of the decoder.")
    bytes: int = 0
    reference_bytes: int = 0
    failure: Failure | None = None


def check(request: CheckRequest) -> CheckReport:
    """Verify a checkpoint.

    Raises:
        QuantmillError: an error that isn't the checkpoint's: the reference, the text, the device.
    """
    folder = Path(request.checkpoint)
    reference = Path(request.reference.folder or "")
    pin = request.reference
    with Source(reference, allow_pickle=pin.allow_pickle, variant=pin.variant) as source:
        comparison = Comparison(
            request.reference, source, request.verification, Path(request.workspace), request.runtimes
        )
        comparison.load()
        comparison.check_source()
        findings = Findings([*_sealed(folder), *_companions(comparison, folder)])
        findings.notes += _generation(source.folder, folder, findings.problems)
        facts, report = _facts(comparison, folder, findings)
        verdict = gates.judge(facts, request.thresholds, folder)
        return report.model_copy(
            update={"verdict": verdict, "notes": tuple(findings.notes), "reference_bytes": source.bytes}
        )


def _facts(comparison: Comparison, folder: Path, findings: Findings) -> tuple[gates.Evidence, CheckReport]:
    report = CheckReport(linear=len(comparison.reference.weights))
    try:
        device, _ = compute_device()
        with open_decoded(folder, trust_remote_code=comparison.model.trust_remote_code, device=device) as opened:
            report = report.model_copy(update={"bytes": opened.bytes})
            quantized = opened.quantized if isinstance(opened, Decoded) else frozenset[str]()
            unquantized = [w.module for w in comparison.reference.weights if w.module not in quantized]
            report = report.model_copy(update={"quantized": report.linear - len(unquantized)})
            if quantized and unquantized:
                findings.notes += listed("linear layers in half precision", unquantized)
            compare(comparison.source, opened, quantized, findings, comparison.unused, ours=False)
            return comparison.measure(folder, opened, findings), report
    except UnsupportedRecipe as error:
        # Our decoder's limitation, not the checkpoint's fault; the runtime can still be checked.
        if not comparison.runtimes and _by_a_quantizer(folder):
            findings.notes.append(undecoded.NOTE)
            return undecoded.measure(comparison, folder, findings.problems), report
        return comparison.only_runtime(folder, findings.problems, [f"fidelity: {error}"]), report
    except (UserError, NumericalError) as error:
        return gates.Evidence(integrity=[*findings.problems, f"integrity: {error}"]), report


def _by_a_quantizer(folder: Path) -> bool:
    """Whether transformers' quantizers alone know the format, so that its predictions are what can be measured.

    A method that they don't know, either, is ignored on loading.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    declared = read_config(folder).get("quantization_config") or {}
    return recognised(declared) is HF_QUANTIZER and declared.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING


def _sealed(folder: Path) -> list[str]:
    """Check the bytes of a checkpoint that has our manifest against it."""
    if not (folder / MANIFEST).is_file():
        return []
    try:
        artifact.check_bytes(folder)
    except CheckpointError as error:
        return [f"integrity: {error}"]
    return []


def _companions(comparison: Comparison, folder: Path) -> Iterator[str]:
    """Yield differences in meaning between the config and tokenizer and the source's."""
    from transformers import AutoConfig, AutoTokenizer

    source, trust = comparison.source.folder, comparison.model.trust_remote_code
    try:
        want, got = (AutoConfig.from_pretrained(path, trust_remote_code=trust).to_dict() for path in (source, folder))
    except (OSError, ValueError, KeyError) as error:
        yield f"integrity: config.json can't be read ({_first_line(error)})"
    else:
        yield from differing_settings("config.json", want, got, UNSAID)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        yield f"integrity: no tokenizer that transformers loads ({_first_line(error)})"
    else:
        yield from _tokenizer(comparison, tokenizer)


def _generation(source: Path, folder: Path, problems: list[str]) -> list[str]:
    """Compare generation configs: sampling settings give notes (gptqmodel changes them), token ids give problems."""
    want, got = (_settings(path) for path in (source, folder))
    if want is None:
        return []
    if got is None:
        problems += listed("files of the source missing, or not readable by transformers", [GENERATION_CONFIG])
        return []
    tokens = frozenset(key for key in (*want, *got) if key.endswith("_token_id"))
    others = (frozenset(want) | frozenset(got)) - tokens
    problems += differing_settings(GENERATION_CONFIG, want, got, UNSAID | others)
    return differing_settings(GENERATION_CONFIG, want, got, UNSAID | tokens)


def _settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint's generation_config.json; None if there is none that transformers reads."""
    from transformers import GenerationConfig

    if unreadable(folder):
        return None
    try:
        settings: dict[str, Any] = GenerationConfig.from_pretrained(folder).to_diff_dict()
    except OSError:
        return None
    return settings


def _tokenizer(comparison: Comparison, theirs: Any) -> Iterator[str]:
    ours = comparison.tokenizer
    text = ours.decode(comparison.tokens.flatten()[:SAMPLE_TOKENS])
    compared = {
        "vocabulary": (ours.get_vocab(), theirs.get_vocab()),
        "special tokens": (ours.special_tokens_map, theirs.special_tokens_map),
        "tokens of the held-out text": (ours(text)["input_ids"], theirs(text)["input_ids"]),
        "chat template": (ours.chat_template, theirs.chat_template),
    }
    yield from listed("the tokenizer differs from the source's", [what for what, (a, b) in compared.items() if a != b])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def answer(request: str) -> str:
    """A ``CheckReport`` for a ``CheckRequest``, both as JSON."""
    parsed = CheckRequest.model_validate_json(request)
    try:
        report = check(parsed)
    except Exception as error:
        report = CheckReport(failure=describe(error))
    return report.model_dump_json()
