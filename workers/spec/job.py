"""The data model of a job: a worker's requests and results.

Frozen, unknown keys refused, validated once at the edge (docs/style.md 1). No torch, no ray: the driver imports it.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from workers.spec.base import Frozen, canonical_json
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.formats import FORMATS
from workers.spec.recipes import BitsAndBytesRecipe, Recipe

# ----------------------------------------------------------------------------- gates, destination


class Thresholds(Frozen):
    """An artifact's acceptance thresholds; each is tested against the metric's confidence bound, not its estimate."""

    kl_mean: float = Field(gt=0, description="At most, in nats for each token.")
    top1_agreement: float = Field(gt=0, le=1, description="At least (Wilson lower bound).")
    perplexity_ratio: float = Field(gt=1, description="At most, quantized over reference.")
    runtime_logit_difference: float = Field(
        gt=0, description="At most: root mean square of runtime - ours, in standard deviations of our logits."
    )
    kl_least: float = Field(
        1e-9, ge=0, description="Less, in nats, isn't quantized: the reference was compared with itself."
    )
    perplexity_ratio_least: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="Better, by the upper bound, is suspicious: another model, or one that knows the text.",
    )


class HubLimits(Frozen):
    """One account's rate limits on a Hub; the defaults are those observed on the public Hub."""

    requests: int = Field(1000, ge=1, description="Of the API, in any request_seconds.")
    files: int = Field(5000, ge=1, description="Requests for files (/resolve/), in any request_seconds.")
    request_seconds: float = Field(300.0, gt=0, description="Length of the window for requests, in seconds.")
    commits: int = Field(1000, ge=1, description="To all repositories together, in any commit_seconds.")
    commits_to_a_repository: int = Field(128, ge=1, description="To one repository, in any commit_seconds.")
    commit_seconds: float = Field(3600.0, gt=0, description="Length of the window for commits, in seconds.")


class Destination(Frozen):
    """Where accepted artifacts are published: a Hub, or a folder of any file system; with the settings."""

    endpoint: str
    private: bool = True
    gated: Literal[False, "auto", "manual"] = False
    keep: int | None = Field(None, ge=1, description="Revisions whose tags stay; None: all.")
    force: bool = Field(False, description="Overwrite what somebody else changed.")
    gather: bool = Field(False, description="Put an artifact beside the others of a gathered repository.")
    limits: HubLimits = HubLimits()


class ModelPin(Frozen):
    """A model at one commit (for a folder: the hash of its content)."""

    id: str
    revision: str
    folder: str | None = Field(None, description="Absolute path, for a model that is a folder.")
    endpoint: str | None = Field(None, description="The Hub it comes from, for one that is not.")
    trust_remote_code: bool = False
    allow_pickle: bool = False
    adds_special_tokens: bool = Field(
        False, description="Its tokenizer begins texts with special tokens, or may: part of what calibration sees."
    )
    variant: str | None = Field(None, description="Of the weight files' names: model.VARIANT.safetensors.")
    dequantize: bool = Field(False, description="It is quantized, and what it decodes to is the source.")
    mixture: bool = Field(
        False,
        description="A mixture of experts, or with prediction heads: its artifacts declare matrices of no Linear.",
    )


class Order(Frozen):
    """One artifact to make: a recipe, its identity, its thresholds, and its destination."""

    recipe: Recipe
    fingerprint: str
    thresholds: Thresholds
    repo_id: str | None = None
    gathered: bool = Field(False, description="Its repository holds other artifacts of the model, too.")
    runtimes: tuple[str, ...] = Field((), description="Runtimes that check it; empty: the one of its format.")


class Job(Frozen):
    """One model with all recipes that still have to be made: the unit that the driver schedules."""

    model: ModelPin
    orders: tuple[Order, ...]
    calibration: Calibration | None
    verification: Verification
    destination: Destination | None
    workspace: str
    storage: str | None = Field(None, description="Where made artifacts are kept for other nodes: a path, or a URL.")
    lean: bool = Field(False, description="Compute in the smallest micro-batches: more of them ran out of memory.")

    def order(self, recipe: str) -> Order:
        """The order for the recipe of that name."""
        return next(order for order in self.orders if order.recipe.name == recipe)


class Part(Frozen):
    """One part of a quantize stage that is spread over workers (``workers.quantize.spread``); ``join`` has only one
    part."""

    step: Literal["gather", "solve", "join"]
    index: int = Field(0, ge=0)
    of: int = Field(ge=1, description="Parts of the job, the same in all three steps.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Part:
        if self.index >= (1 if self.step == "join" else self.of):
            raise ValueError(f"part {self.index} of {self.of}: {self.step} has no such part")
        return self


class Stage(StrEnum):
    """The stages of a job, in order."""

    FETCH = "fetch"
    QUANTIZE = "quantize"
    KEEP = "keep"
    VERIFY = "verify"
    PUBLISH = "publish"


def stage_label(stage: Stage, part: Part | None, model: ModelPin, recipe: str | None) -> str:
    """Label of a stage in Ray's dashboard and in errors."""
    part_label = f"{part.step} {part.index + 1}/{part.of}" if part else None
    return " ".join(filter(None, [stage.value, part_label, Path(model.id).name, recipe]))


# ----------------------------------------------------------------------------------------- what comes back


class Metrics(Frozen):
    """Fidelity against the half-precision reference on held-out text; KL in nats."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_mean_upper: float
    kl_p99: float
    top1_agreement: float
    top1_agreement_lower: float
    perplexity_ratio_upper: float
    eval_tokens: int
    perplexity_ratio_lower: float = 0.0


# How far a runtime's check went: on this processor as its users run it, or without its kernels.
Checked = Literal["checked", "loader checked, kernels not"]
CHECKED: Checked = "checked"
LOADER_CHECKED: Checked = "loader checked, kernels not"


class RuntimeAgreement(Frozen):
    """Agreement between the users' library and our own decoder; the last four fields are absent in older manifests."""

    name: str
    version: str
    max_abs_logit_difference: float
    relative_logit_difference: float
    generated: str
    host_bytes: int = Field(0, description="Peak of the process that loaded it; 0 in older manifests.")
    kl_mean: float | None = Field(None, description="Of its predictions from ours, in nats.")
    processor: str = ""
    verdict: Checked = CHECKED
    kernels: str = Field("", description="Why the library's own kernels weren't run here; empty if they were.")

    @model_serializer(mode="wrap")
    def _as_it_was_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what older manifests don't have, so that theirs keep their bytes."""
        content: dict[str, Any] = serialize(self)
        if self.kl_mean is None:
            for name in ("kl_mean", "processor", "verdict", "kernels"):
                content.pop(name, None)
        return content

    @property
    def said(self) -> str:
        """Library, version, processor and what was checked, as reports show it."""
        processor = f" on {self.processor}" if self.processor else ""
        return f"{self.name} {self.version}{processor}: {self.verdict}"


class SourceCheck(Frozen):
    """Agreement between the source as transformers itself loads it, in a process of its own, and our reference."""

    version: str = Field("", description="Of transformers.")
    relative_logit_difference: float = Field(0.0, description="Root mean square, in standard deviations of the logits.")
    tokens: int = 0
    layers: int = Field(0, description="Layers of the compared model: its first ones, where all don't fit in memory.")
    all_layers: int
    unchecked: str = Field("", description="Why nothing was compared; empty if it was.")
    host_bytes: int = Field(0, description="Peak of the process that loaded it; 0 if that was in an earlier stage.")


class PictureCheck(Frozen):
    """Agreement between a multimodal artifact and its source on a prompt with a picture, both in transformers."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    version: str = Field("", description="Of transformers.")
    kl_mean: float = Field(0.0, description="Nats, over the tokens after the picture.")
    top1_agreement: float = 0.0
    tokens: int = 0
    unchecked: str = Field("", description="Why no picture was shown to it; empty if one was.")


class Outcome(StrEnum):
    """A verdict's outcome: accepted; broken or worse than allowed; implausibly good, or evaluated on too few tokens; or
    undecidable here (a runtime isn't installed, or the sample is too small). Only accepted artifacts are published."""

    ACCEPT = "ACCEPT"
    REGRESSION = "REGRESSION"
    ANOMALOUS = "ANOMALOUS"
    INFEASIBLE = "INFEASIBLE"


class ReasonCode(StrEnum):
    """The kind of a reason against an artifact."""

    INTEGRITY = "integrity"
    RUNTIME = "runtime"
    INFEASIBLE = "infeasible"
    KL = "kl"
    TOP1 = "top1"
    PERPLEXITY = "perplexity"
    EVAL_TOKENS = "eval-tokens"
    RUNTIME_LOGITS = "runtime-logits"
    PICTURE = "picture"
    GATE = "gate"
    UNSAID = "unsaid"

    @property
    def by_threshold(self) -> bool:
        """Whether other thresholds or gates could lift it: the files are intact, and a runtime loads them."""
        return self in _BY_THRESHOLD


_BY_THRESHOLD = frozenset(
    {
        ReasonCode.KL,
        ReasonCode.TOP1,
        ReasonCode.PERPLEXITY,
        ReasonCode.RUNTIME_LOGITS,
        ReasonCode.PICTURE,
        ReasonCode.GATE,
    }
)


class Generation(Frozen):
    """Greedy continuations of an artifact and its reference after the same tokens."""

    prompt: str
    artifact: str
    reference: str = Field(description="Up to the first token that differs, with that token.")
    same_tokens: int = Field(description="Tokens before the first that differs.")
    tokens: int


class Verdict(Frozen):
    """The metrics, and the gates' judgement of them."""

    accepted: bool
    reasons: tuple[str, ...]
    codes: tuple[ReasonCode, ...] = Field((), description="What kind of reason each of them is.")
    outcome: Outcome
    metrics: Metrics | None = None
    runtime: RuntimeAgreement | None = None
    worst_layers: tuple[tuple[str, float], ...] = Field((), description="Lowest SQNR first, in dB.")
    generations: tuple[Generation, ...] = ()
    other_runtimes: tuple[RuntimeAgreement, ...] = Field(
        (), description="Agreement with further runtimes, where a zoo names several; `runtime` is the first."
    )
    picture: PictureCheck | None = Field(None, description="Of multimodal models alone.")
    layer_noise: tuple[float | None, ...] = Field(
        (),
        description="Lowest SQNR in dB of each layer's quantized weights, by number; null: none is, or none differs.",
    )

    @property
    def runtimes(self) -> tuple[RuntimeAgreement, ...]:
        """All runtimes whose logits were compared."""
        return (*((self.runtime,) if self.runtime else ()), *self.other_runtimes)

    @model_validator(mode="before")
    @classmethod
    def _of_older_manifests(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        outcome = Outcome.ACCEPT if value.get("accepted") else Outcome.REGRESSION
        codes = [ReasonCode.UNSAID for _ in value.get("reasons", ())]
        return {"outcome": outcome, "codes": codes, **value}

    @model_serializer(mode="wrap")
    def _without_empty_codes(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what is empty of what came later: manifests keep the bytes of before those."""
        content: dict[str, Any] = serialize(self)
        for name in ("codes", "other_runtimes", "picture", "layer_noise"):
            if not getattr(self, name):
                content.pop(name, None)
        return content


class FileEntry(Frozen):
    """One file of an artifact."""

    sha256: str
    size: int


class Manifest(Frozen):
    """``quantmill.json``: written last, so that an artifact that has it is complete."""

    schema_version: Literal[1] = 1
    fingerprint: str
    model: str
    revision: str
    recipe: Recipe
    calibration: Calibration | None
    verification: Verification
    thresholds: Thresholds
    files: dict[str, FileEntry]
    verdict: Verdict
    environment: dict[str, str]
    fallbacks: tuple[str, ...]
    bytes: int
    reference_bytes: int
    created_at: str
    sequences_begin_with: tuple[str, ...] | None = Field(
        None, description="Special tokens before each sequence that was calibrated on and compared; None: not said."
    )
    source_check: SourceCheck | None = Field(None, description="None in older manifests.")
    expert_tokens: tuple[ExpertTokens, ...] = Field(
        (), description="Calibration tokens that came to each layer's experts; empty: no experts, or not counted."
    )

    def checked_in(self, runtimes: tuple[str, ...]) -> bool:
        """Whether it was compared with all of these runtimes; none named: with any."""
        return set(runtimes) <= {runtime.name for runtime in self.verdict.runtimes}


class PeakMemory(Frozen):
    """Peak bytes of a stage's process; on a GPU those that torch's allocator held, with what it keeps for later."""

    host: int = 0
    device: int = 0


class ExpertTokens(Frozen):
    """How many calibration tokens came to the experts of one layer."""

    layer: int
    experts: int
    least: int
    median: int
    most: int


class ArtifactMade(Frozen):
    """One artifact made by the quantize stage; ``seconds`` are its own share of solving and writing.

    ``made_with``: the card that it was made on, and versions in its engine's environment, where that isn't the stage's.
    """

    recipe: str
    path: str
    bytes: int
    seconds: float
    fallbacks: tuple[str, ...] = ()
    made_with: dict[str, str] = Field(default_factory=dict)
    expert_tokens: tuple[ExpertTokens, ...] = ()
    error: Failure | None = None


class Failure(Frozen):
    """An error sent from a worker to the driver: its class in ``workers.errors`` and its message."""

    kind: str
    message: str
    retry_after: float | None = None
    traceback: str = ""


class StageResult(Frozen):
    """The result of one stage of a job."""

    stage: Stage
    recipe: str | None = None
    node: str = ""
    seconds: float = 0.0
    memory: PeakMemory = PeakMemory()
    reference_bytes: int = 0
    artifacts: tuple[ArtifactMade, ...] = ()
    manifest: Manifest | None = None
    commit: str | None = None
    failure: Failure | None = None
    notes: tuple[str, ...] = Field((), description="What the run's log says of how it ran.")


ArtifactMade.model_rebuild()
StageResult.model_rebuild()


# ---------------------------------------------------------------------------------------------- identity


# Fields of recipes that earlier releases didn't know. Where one isn't set, their artifacts keep their identity.
LATER = ("outside", "kv_cache", "include", "layers")


def _what_determines_bytes(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", exclude={"name", "description", "environment", "labels"})
    if isinstance(recipe, BitsAndBytesRecipe):
        content["options"] = recipe.options.model_dump(mode="json", exclude_defaults=True)
    if content.get("mtp") == "keep":
        del content["mtp"]
    return {key: _known_before(value) for key, value in content.items() if key not in LATER or value is not None}


def _known_before(value: Any) -> Any:
    """A scheme without what it doesn't set of the fields that earlier releases didn't know."""
    if not isinstance(value, dict):
        return value
    later = {"activations"} if value.get("type") in ("mxfp4", "nvfp4") and value.get("activations") == "none" else set()
    if value.get("type") == "transformers":
        later = {"packages", "expected"}  # of which no byte depends
    return {key: _known_before(inner) for key, inner in value.items() if key not in later}


def fingerprint(model: ModelPin, recipe: Recipe, calibration: Calibration | None, data_sha256: str | None) -> str:
    """Identity of an artifact: sha256 of everything that determines its content.

    ``data_sha256`` is the identity of the calibration data, of a mixture's data sets together. Names and descriptions
    don't count: a renamed recipe makes the same bytes.
    """
    content: dict[str, Any] = {
        "model": {
            "revision": model.revision,
            **({} if model.folder else {"id": model.id}),
            **({"variant": model.variant} if model.variant else {}),
        },
        "recipe": _what_determines_bytes(recipe),
        "numerics": recipe.revision,
    }
    if model.mixture and FORMATS[recipe.format].lists_unquantized:
        content["model"]["declares"] = "routers and heads"
    if recipe.calibrated:
        assert calibration is not None, "the plan refuses calibrated recipes without calibration data"
        read = [_how_it_is_read(dataset, model) for dataset in calibration.datasets]
        content["calibration"] = {
            **calibration.model_dump(mode="json", exclude={"dataset", "mixture", "set"}),
            **(read[0] if calibration.dataset is not None else {"mixture": read}),
            "data": data_sha256,
        }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _how_it_is_read(dataset: Dataset, model: ModelPin) -> dict[str, Any]:
    """What determines the tokens of a data set, besides its content."""
    content: dict[str, Any] = {"column": dataset.column, "separator": dataset.separator}
    # Only where they change the tokens: artifacts of earlier releases keep their identity elsewhere.
    if model.adds_special_tokens and dataset.special_tokens != "none":
        content["special_tokens"] = "auto"
    if dataset.holds != "auto":
        content["holds"] = dataset.holds
    later = {"turns", "without_template", "images", "audio", "share"}
    return {**content, **dataset.model_dump(mode="json", include=later)}
