"""The data model of a job: what a worker is told, and what it leaves behind.

Frozen, unknown keys refused, validated once at the edge (STYLE.md 1). No torch, no ray: the driver imports it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MANIFEST = "quantmill.json"
SLUG = re.compile(r"^[a-z0-9][a-z0-9._-]*$")


class Frozen(BaseModel):
    """A value: immutable, and closed to unknown keys."""

    # JSON has no numbers for what a broken model measures: they travel as "NaN" and "Infinity".
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


# ------------------------------------------------------------------------------------------ schemes


class IntScheme(Frozen):
    """Weights on an integer grid with one scale for each group of input columns."""

    type: Literal["int"] = "int"
    bits: int = Field(ge=2, le=8)
    group_size: int | None = Field(128, ge=1, description="Input columns that share a scale; null: a whole row.")
    symmetric: bool = True
    indivisible: Literal["refuse", "channel", "keep"] = Field(
        "refuse",
        description="A layer whose width the group size doesn't divide: refuse the recipe, give that layer one "
        "scale for each output channel, or keep it in half precision. Recorded as a fallback.",
    )

    @property
    def family(self) -> str:
        return f"w{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + (per_group / self.group_size if self.group_size else 0)


class FourBitFloatScheme(Frozen):
    """bitsandbytes' 4-bit codebooks: NF4 (arXiv 2305.14314) or FP4, one absmax for each block of 64."""

    type: Literal["nf4", "fp4"]
    double_quantization: bool = Field(True, description="Store the absmax values themselves in 8 bits.")

    @property
    def family(self) -> str:
        return self.type

    @property
    def bits_per_weight(self) -> float:
        return 4.127 if self.double_quantization else 4.5


class LlmInt8Scheme(Frozen):
    """LLM.int8() (arXiv 2208.07339): int8 rows, outlier columns of the activations in half precision."""

    type: Literal["llm-int8"] = "llm-int8"
    outlier_threshold: float = Field(6.0, ge=0)

    @property
    def family(self) -> str:
        return "llm-int8"

    @property
    def bits_per_weight(self) -> float:
        return 8.0


# ------------------------------------------------------------------------------------------ recipes

# What each format can hold, in words that end an error message. The only table of it.
FORMAT_HOLDS: dict[str, str] = {
    "compressed-tensors": "symmetric int, 4 or 8 bits, ignored layers by name",
    "gptq": "int of 2, 3, 4 or 8 bits, symmetric or not, one group size for all layers, dense models",
    "bitsandbytes": "nf4, fp4 and llm-int8",
}


def format_holds(fmt: str, scheme: IntScheme | FourBitFloatScheme | LlmInt8Scheme) -> bool:
    """Whether a runtime that users have can read ``scheme`` stored as ``fmt``."""
    match scheme:
        case IntScheme(bits=bits, symmetric=symmetric):
            # transformers 5.23 fails to load asymmetric pack-quantized (weight_zero_point size mismatch).
            if fmt == "compressed-tensors":
                return bits in (4, 8) and symmetric
            return fmt == "gptq" and bits in (2, 3, 4, 8)
        case _:
            return fmt == "bitsandbytes"


class NoOptions(Frozen):
    """A method without settings."""


class GptqOptions(Frozen):
    """Settings of GPTQ (arXiv 2210.17323)."""

    scales: Literal["minmax", "mse"] = Field("mse", description="How a group's range is chosen.")
    activation_order: bool = Field(True, description="Solve columns in order of falling diag(H); groups stay static.")
    damping: float = Field(0.01, gt=0, lt=1, description="Added to diag(H), as a share of its mean.")


class RtnOptions(Frozen):
    """Settings of rounding to nearest."""

    scales: Literal["minmax", "mse"] = "minmax"


Format = Literal["compressed-tensors", "gptq", "bitsandbytes"]


class RecipeBase(Frozen):
    """What every recipe has, whatever its method."""

    name: str = Field(pattern=SLUG.pattern, max_length=64)
    description: str = ""
    ignore: tuple[str, ...] = Field(
        ("lm_head", "*.router", "*.mlp.gate", "*.block_sparse_moe.gate", "*.shared_expert_gate", "*.dt_proj"),
        description="Modules left as they are: names, shell patterns, or re:REGEX. The default: head and routers, and "
        "Mamba's dt_proj, whose weight isn't used as a linear layer's.",
    )

    @field_validator("ignore")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"ignore: {pattern!r} is no regular expression ({error}); mend it") from error
        return value

    @property
    def calibrated(self) -> bool:
        """Whether the recipe needs statistics of a calibration text."""
        return False

    def ignores(self, module: str) -> bool:
        """Whether the module named ``module`` stays in half precision."""
        return any(matches(pattern, module) for pattern in self.ignore)


class IntRecipe(RecipeBase):
    """A recipe whose codes lie on an integer grid."""

    scheme: IntScheme
    format: Format

    @model_validator(mode="after")
    def _readable(self) -> Self:
        _check_readable(self)
        return self


class GptqRecipe(IntRecipe):
    """GPTQ: second-order error compensation from the calibration Hessian."""

    method: Literal["gptq"]
    options: GptqOptions = GptqOptions()

    @property
    def calibrated(self) -> bool:
        return True


class RtnRecipe(IntRecipe):
    """Round to nearest."""

    method: Literal["rtn"]
    options: RtnOptions = RtnOptions()


class BitsAndBytesRecipe(RecipeBase):
    """bitsandbytes: the library's own kernels, its own serialized form."""

    method: Literal["bitsandbytes"]
    scheme: Annotated[FourBitFloatScheme | LlmInt8Scheme, Field(discriminator="type")]
    format: Format = "bitsandbytes"
    options: NoOptions = NoOptions()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        _check_readable(self)
        return self


Recipe = Annotated[GptqRecipe | RtnRecipe | BitsAndBytesRecipe, Field(discriminator="method")]

# Raised by one whenever a change alters the bytes that a method writes: old artifacts are then made again.
NUMERICS_VERSION: dict[str, int] = {"gptq": 1, "rtn": 1, "bitsandbytes": 1}


def _check_readable(recipe: IntRecipe | BitsAndBytesRecipe) -> None:
    scheme, fmt = recipe.scheme, recipe.format
    if format_holds(fmt, scheme):
        return
    fits = [name for name in FORMAT_HOLDS if format_holds(name, scheme)]
    wanted = scheme.model_dump_json(exclude={"indivisible"})
    remedy = f"choose format: {' or '.join(fits)}" if fits else "no format that a runtime reads holds it"
    raise ValueError(
        f"recipe {recipe.name!r}: format {fmt!r} can't hold the scheme {wanted} "
        f"(it holds {FORMAT_HOLDS[fmt]}); {remedy}"
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a module name fits a pattern of a recipe's ignore list."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


# ----------------------------------------------------------------------------- data, gates, destination


class Dataset(Frozen):
    """Text, as ``datasets.load_dataset`` reads it."""

    path: str = Field(description="A builder (text, json, parquet, ...) or a Hub data set.")
    name: str | None = None
    data_files: tuple[str, ...] = Field((), description="Files, relative to the zoo file.")
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    separator: str = Field("\n", description="Put between two rows when they are joined into one stream of tokens.")


class Calibration(Frozen):
    """The text that calibrated recipes learn their statistics from."""

    dataset: Dataset
    samples: int = Field(128, ge=1)
    sequence_length: int = Field(512, ge=8)
    seed: int = 0


class Thresholds(Frozen):
    """What an artifact must reach; every bound is tested by its confidence bound, not by the point estimate."""

    kl_mean: float = Field(gt=0, description="At most, in nats for each token.")
    top1_agreement: float = Field(gt=0, le=1, description="At least (Wilson lower bound).")
    perplexity_ratio: float = Field(gt=1, description="At most, quantized over reference.")
    runtime_logit_difference: float = Field(
        gt=0, description="At most: root mean square of runtime - ours, in standard deviations of our logits."
    )


class Verification(Frozen):
    """The held-out text, how much of it, and the gates."""

    dataset: Dataset
    data: str = Field("", description="What stands for the text's content: sha256, set by the plan.")
    tokens: int = Field(16384, ge=256)
    sequence_length: int = Field(512, ge=8)

    def same_as(self, other: Verification) -> bool:
        """Whether both compare on the same tokens."""
        mine, theirs = ((v.data, v.tokens, v.sequence_length) for v in (self, other))
        return mine == theirs


class Destination(Frozen):
    """Where accepted artifacts go."""

    endpoint: str
    private: bool = True


class ModelPin(Frozen):
    """A model at one commit (a folder: the hash of its content)."""

    id: str
    revision: str
    folder: str | None = Field(None, description="Absolute path, for a model that is a folder.")
    endpoint: str | None = Field(None, description="The Hub it comes from, for one that is not.")
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Order(Frozen):
    """One artifact to make: a recipe, its identity, its gates, and where it goes."""

    recipe: Recipe
    fingerprint: str
    thresholds: Thresholds
    repo_id: str | None = None


class Job(Frozen):
    """One model with all of its recipes still to be made: the unit that the driver schedules."""

    model: ModelPin
    orders: tuple[Order, ...]
    calibration: Calibration | None
    verification: Verification
    destination: Destination | None
    workspace: str

    def order(self, recipe: str) -> Order:
        """The order for the recipe of that name."""
        return next(order for order in self.orders if order.recipe.name == recipe)


def artifact_folder(workspace: Path | str, order: Order) -> Path:
    """Where an artifact lies once it is whole; its name tells people the recipe, and machines the identity."""
    return Path(workspace) / "artifacts" / f"{order.recipe.name}-{order.fingerprint[:16]}"


class Stage(StrEnum):
    """The stages of a job, in order."""

    FETCH = "fetch"
    QUANTIZE = "quantize"
    VERIFY = "verify"
    PUBLISH = "publish"


# ----------------------------------------------------------------------------------------- what comes back


class Metrics(Frozen):
    """Fidelity against the half-precision reference on held-out text; KL in nats."""

    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_mean_upper: float
    kl_p99: float
    top1_agreement: float
    top1_agreement_lower: float
    perplexity_ratio_upper: float
    eval_tokens: int


class Runtime(Frozen):
    """How the library that users load the artifact with agreed with our own decoder."""

    name: str
    version: str
    max_abs_logit_difference: float
    relative_logit_difference: float
    generated: str


class Verdict(Frozen):
    """The metrics, and what the gates say of them."""

    accepted: bool
    reasons: tuple[str, ...]
    metrics: Metrics | None = None
    runtime: Runtime | None = None
    worst_layers: tuple[tuple[str, float], ...] = Field((), description="Lowest SQNR first, in dB.")


class FileEntry(Frozen):
    """One file of an artifact."""

    sha256: str
    size: int


class Manifest(Frozen):
    """``quantmill.json``: written last, so that an artifact with one is whole."""

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


class PeakMemory(Frozen):
    """Peak bytes of a stage's process."""

    host: int = 0
    device: int = 0


class ArtifactMade(Frozen):
    """One artifact as the quantize stage wrote it: solve and writing time are its own share."""

    recipe: str
    path: str
    bytes: int
    seconds: float
    fallbacks: tuple[str, ...] = ()
    error: Failure | None = None


class Failure(Frozen):
    """An error, as it travels from a worker to the driver: its class in ``workers.errors`` and its message."""

    kind: str
    message: str
    retry_after: float | None = None
    traceback: str = ""


class StageResult(Frozen):
    """What one stage of a job returns to the driver."""

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


ArtifactMade.model_rebuild()
StageResult.model_rebuild()


# ---------------------------------------------------------------------------------------------- identity


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: for anything that isn't plain JSON; identity is never ``str()`` of an object.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def fingerprint(model: ModelPin, recipe: Recipe, calibration: Calibration | None, data_sha256: str | None) -> str:
    """Identity of an artifact: sha256 over all that determines its content.

    ``data_sha256`` is the identity of the calibration data. Names and descriptions don't count: a recipe that
    is renamed makes the same bytes.
    """
    content: dict[str, Any] = {
        "model": {"revision": model.revision, **({} if model.folder else {"id": model.id})},
        "recipe": recipe.model_dump(mode="json", exclude={"name", "description"}),
        "numerics": NUMERICS_VERSION[recipe.method],
    }
    if recipe.calibrated:
        assert calibration is not None, "the plan refuses calibrated recipes without calibration data"
        content["calibration"] = {
            **calibration.model_dump(mode="json", exclude={"dataset"}),
            "column": calibration.dataset.column,
            "separator": calibration.dataset.separator,
            "data": data_sha256,
        }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
