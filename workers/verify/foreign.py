"""Verify a checkpoint that quantmill needn't have made: ``answer`` is asked in a fresh process.

A process of its own, for the command line never loads torch. Other tools write their companions anew and fold scales
into norms without saying which, so files count by what they mean, and weights by what the model then predicts.
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
from workers.spec.base import Frozen
from workers.spec.job import Failure, ModelPin, Thresholds, Verdict, Verification
from workers.spec.workspace import MANIFEST
from workers.transfer import artifact
from workers.verify import gates
from workers.verify.comparison import Comparison
from workers.verify.integrity import QUANTIZERS_OWN, Findings, compare, differing_settings, listed

# What a tool that saves a checkpoint anew may write otherwise, without changing the model.
UNSAID = QUANTIZERS_OWN | {"_name_or_path", "use_cache", "_attn_implementation_autoset"}
SAMPLE_TOKENS = 2048


class CheckRequest(Frozen):
    """A checkpoint, its reference (folders, fetched), the text, and what has to be kept."""

    checkpoint: str
    reference: ModelPin = Field(description="With its folder.")
    verification: Verification
    thresholds: Thresholds
    workspace: str


class CheckReport(Frozen):
    """What came out."""

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
        QuantmillError: what isn't the checkpoint's fault: the reference, the text, the device.
    """
    folder = Path(request.checkpoint)
    reference = Path(request.reference.folder or "")
    with Source(reference, allow_pickle=request.reference.allow_pickle) as source:
        comparison = Comparison(request.reference, source, request.verification, Path(request.workspace))
        comparison.load()
        found = Findings([*_sealed(folder), *_companions(comparison, folder)])
        found.notes += _generation(source.folder, folder, found.problems)
        facts, report = _facts(comparison, folder, found)
        verdict = gates.judge(facts, request.thresholds)
        return report.model_copy(
            update={"verdict": verdict, "notes": tuple(found.notes), "reference_bytes": source.bytes}
        )


def _facts(comparison: Comparison, folder: Path, found: Findings) -> tuple[gates.Evidence, CheckReport]:
    report = CheckReport(linear=len(comparison.reference.weights))
    try:
        with open_decoded(folder, trust_remote_code=comparison.model.trust_remote_code) as opened:
            report = report.model_copy(update={"bytes": opened.bytes})
            quantized = opened.quantized if isinstance(opened, Decoded) else frozenset[str]()
            kept = [w.module for w in comparison.reference.weights if w.module not in quantized]
            report = report.model_copy(update={"quantized": report.linear - len(kept)})
            if quantized and kept:
                found.notes += listed("linear layers in half precision", kept)
            compare(comparison.source, opened, quantized, found, ours=False)
            return comparison.measure(folder, opened, found), report
    except UnsupportedRecipe as error:
        # Not the checkpoint's fault; but what the runtime makes of it may be.
        return comparison.only_runtime(folder, found.problems, [f"fidelity: {error}"]), report
    except (UserError, NumericalError) as error:
        return gates.Evidence(integrity=[*found.problems, f"integrity: {error}"]), report


def _sealed(folder: Path) -> list[str]:
    """If the checkpoint has a manifest of ours, its bytes are the manifest's."""
    if not (folder / MANIFEST).is_file():
        return []
    try:
        artifact.check_bytes(folder)
    except CheckpointError as error:
        return [f"integrity: {error}"]
    return []


def _companions(comparison: Comparison, folder: Path) -> Iterator[str]:
    """Config and tokenizer mean what the source's mean."""
    from transformers import AutoConfig, AutoTokenizer

    source, trust = comparison.source.folder, comparison.model.trust_remote_code
    try:
        want, got = (AutoConfig.from_pretrained(place, trust_remote_code=trust).to_dict() for place in (source, folder))
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
    """Other settings of sampling are worth knowing (gptqmodel turns it on); another end of the text breaks a model."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    if not (source / name).is_file():
        return []
    if not (folder / name).is_file():
        problems += listed("files of the source missing", [name])
        return []
    want, got = (GenerationConfig.from_pretrained(place).to_diff_dict() for place in (source, folder))
    tokens = frozenset(key for key in (*want, *got) if key.endswith("_token_id"))
    others = (frozenset(want) | frozenset(got)) - tokens
    problems += differing_settings(name, want, got, UNSAID | others)
    return differing_settings(name, want, got, UNSAID | tokens)


def _tokenizer(comparison: Comparison, theirs: Any) -> Iterator[str]:
    own = comparison.tokenizer
    text = own.decode(comparison.tokens.flatten()[:SAMPLE_TOKENS])
    said = {
        "vocabulary": (own.get_vocab(), theirs.get_vocab()),
        "special tokens": (own.special_tokens_map, theirs.special_tokens_map),
        "tokens of the held-out text": (own(text)["input_ids"], theirs(text)["input_ids"]),
        "chat template": (own.chat_template, theirs.chat_template),
    }
    yield from listed("the tokenizer differs from the source's", [what for what, (a, b) in said.items() if a != b])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def answer(request: str) -> str:
    """A ``CheckReport`` for a ``CheckRequest``, both as JSON."""
    asked = CheckRequest.model_validate_json(request)
    try:
        report = check(asked)
    except Exception as error:
        report = CheckReport(failure=describe(error))
    return report.model_dump_json()
