"""What a recipe says: a method, a scheme and a format, and which of them go together.

Method (how the codes are chosen), scheme (what the codes are) and format (how they are stored) are three things; a
recipe names one of each. Frozen, unknown keys refused. No torch: the driver imports it.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

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
    activations: Literal["none", "int8"] = Field(
        "none", description="int8: each token's activations are rounded to 8 bits while the model runs."
    )
    indivisible: Literal["refuse", "channel", "keep"] = Field(
        "refuse",
        description="A layer whose width the group size doesn't divide: refuse the recipe, give that layer one "
        "scale for each output channel, or keep it in half precision. Recorded as a fallback.",
    )

    @model_validator(mode="after")
    def _eight_bit_activations(self) -> Self:
        if self.activations == "int8" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ValueError(
                "activations: int8 goes with bits: 8, group_size: null and symmetric: true alone, got "
                f"bits {self.bits}, group_size {self.group_size}, symmetric {self.symmetric}"
            )
        return self

    @property
    def family(self) -> str:
        return "w8a8" if self.activations == "int8" else f"w{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + (per_group / self.group_size if self.group_size else 0)


class Float8Scheme(Frozen):
    """FP8 E4M3 (arXiv 2209.05433): eight bits with an exponent, a scale for each tensor, output channel or block."""

    type: Literal["fp8"] = "fp8"
    scales: Literal["tensor", "channel", "block"] = Field("channel", description="block: 128 x 128 weights.")
    activations: Literal["none", "dynamic", "static"] = Field(
        "dynamic",
        description="dynamic: a scale for each token (with block scales: each 128 of its inputs) while the model "
        "runs; static: one scale for each layer's input, from the calibration text.",
    )

    @model_validator(mode="after")
    def _blocks_are_dynamic(self) -> Self:
        if self.scales == "block" and self.activations != "dynamic":
            raise ValueError(f"scales: block goes with activations: dynamic alone, got {self.activations!r}")
        return self

    @property
    def family(self) -> str:
        return "fp8"

    @property
    def bits_per_weight(self) -> float:
        return 8.0 + (32 / 128**2 if self.scales == "block" else 0)


class MicroscalingScheme(Frozen):
    """E2M1 weights with small groups: MXFP4 (OCP Microscaling 1.0) or NVFP4; activations stay as they are.

    mxfp4: a power of two for each 32 weights. nvfp4: an E4M3 scale for each 16, and one float32 scale for the tensor.
    """

    type: Literal["mxfp4", "nvfp4"]

    @property
    def group_size(self) -> int:
        return 32 if self.type == "mxfp4" else 16

    @property
    def family(self) -> str:
        return self.type

    @property
    def bits_per_weight(self) -> float:
        return 4 + 8 / self.group_size


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


LinearScheme = IntScheme | Float8Scheme | MicroscalingScheme


def _kind(value: object) -> str:
    """Which class of schemes a value is for; int unless it says otherwise."""
    found = value.get("type", "int") if isinstance(value, dict) else getattr(value, "type", "int")
    return {"fp8": "fp8", "mxfp4": "microscaling", "nvfp4": "microscaling"}.get(found, "int")


AnyLinearScheme = Annotated[
    Annotated[IntScheme, Tag("int")]
    | Annotated[Float8Scheme, Tag("fp8")]
    | Annotated[MicroscalingScheme, Tag("microscaling")],
    Discriminator(_kind),
]
Scheme = LinearScheme | FourBitFloatScheme | LlmInt8Scheme

# ------------------------------------------------------------------------------------------ formats

Format = Literal["compressed-tensors", "gptq", "gptq-v2", "awq", "fp8", "bitsandbytes"]

# What each format can hold, in words that end an error message. The only table of it.
FORMAT_HOLDS: dict[str, str] = {
    "compressed-tensors": "symmetric int of 2 to 8 bits, a scheme of its own for each layer, fp8 with scales for each "
    "tensor or channel, mxfp4 and nvfp4",
    "gptq": "int of 2, 3, 4 or 8 bits, symmetric or not, one scheme for all layers, dense models",
    "gptq-v2": "int of 2, 3, 4 or 8 bits, symmetric or not, one scheme for all layers, dense models",
    "awq": "asymmetric int of 4 bits, one scheme for all layers, dense models",
    "fp8": "fp8 with scales for each block",
    "bitsandbytes": "nf4, fp4 and llm-int8",
}


def format_holds(fmt: str, scheme: Scheme) -> bool:
    """Whether a runtime that users have can read ``scheme`` stored as ``fmt``."""
    match scheme:
        case IntScheme(activations="int8"):
            return fmt == "compressed-tensors"
        case IntScheme(bits=bits, symmetric=symmetric):
            # transformers 5.23 fails to load asymmetric pack-quantized (weight_zero_point size mismatch).
            if fmt == "compressed-tensors":
                return symmetric
            return (fmt in ("gptq", "gptq-v2") and bits in (2, 3, 4, 8)) or (
                fmt == "awq" and bits == 4 and not symmetric
            )
        case Float8Scheme(scales=scales):
            return fmt == ("fp8" if scales == "block" else "compressed-tensors")
        case MicroscalingScheme():
            return fmt == "compressed-tensors"
        case _:
            return fmt == "bitsandbytes"


# ------------------------------------------------------------------------------------------ methods


class NoOptions(Frozen):
    """A method without settings."""


class RtnOptions(Frozen):
    """Settings of rounding to nearest."""

    scales: Literal["minmax", "mse"] = Field("minmax", description="How the range of an int group is chosen.")


class GptqOptions(Frozen):
    """Settings of GPTQ (arXiv 2210.17323)."""

    scales: Literal["minmax", "mse"] = Field("mse", description="How a group's range is chosen.")
    activation_order: bool = Field(True, description="Solve columns in order of falling diag(H); groups stay static.")
    damping: float = Field(0.01, gt=0, lt=1, description="Added to diag(H), as a share of its mean.")
    refine: int = Field(
        3,
        ge=0,
        le=100,
        description="After solving: rounds of least squares for the scales and coordinate descent for the codes, "
        "both under the same Hessian; 0: none.",
    )
    propagate: Literal["original", "quantized"] = Field(
        "original",
        description="Which activations are calibrated on: the original model's (one stream for all recipes), or this "
        "recipe's own, through the layers that it has quantized so far.",
    )


class AwqOptions(Frozen):
    """Settings of AWQ (arXiv 2306.00978)."""

    grid: int = Field(20, ge=1, le=1000, description="Exponents tried between 0 and 1 for the scales of the inputs.")
    clip: bool = Field(True, description="Search the range of each group for the least error on the activations.")


class SmoothQuantOptions(Frozen):
    """Settings of SmoothQuant (arXiv 2211.10438)."""

    strength: float = Field(
        0.5, ge=0, le=1, description="alpha: how much of the activations' range moves into weights."
    )
    scales: Literal["minmax", "mse"] = Field("minmax", description="How the range of an output channel is chosen.")


class HqqOptions(Frozen):
    """Settings of half-quadratic quantization (Badri and Shaji, 2023)."""

    iterations: int = Field(20, ge=1, le=1000)
    norm: float = Field(0.7, gt=0, lt=2, description="p of the l_p norm of the error that is made small.")


IGNORED_BY_DEFAULT = (
    "lm_head",
    "*.router",
    "*.router.*",
    "*.mlp.gate",
    "*.block_sparse_moe.gate",
    "*.shared_expert_gate",
    "*.dt_proj",
)


class RecipeBase(Frozen):
    """What every recipe has, whatever its method."""

    name: str = Field(pattern=SLUG.pattern, max_length=64)
    description: str = ""
    environment: str | None = Field(
        None,
        pattern=SLUG.pattern,
        max_length=64,
        description="A prebuilt environment that it's made and verified in (`quantmill env create`).",
    )
    labels: dict[str, str] = Field(
        {},
        description="What a node has to meet, by Ray's labels, as {ray.io/accelerator-type: H100}: a value, !value, "
        "in(a,b) or !in(a,b).",
    )
    ignore: tuple[str, ...] = Field(
        IGNORED_BY_DEFAULT,
        description="Modules left as they are: names, shell patterns, or re:REGEX. The default: head and routers, and "
        "Mamba's dt_proj, whose weight isn't used as a linear layer's.",
    )

    @field_validator("ignore")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled("ignore", value)

    @property
    def calibrated(self) -> bool:
        """Whether the recipe needs statistics of a calibration text."""
        return False

    @property
    def needs_magnitudes(self) -> bool:
        """Whether a calibrated recipe looks at how large inputs are, beside their products with one another."""
        return self.calibrated

    @property
    def folds(self) -> bool:
        """Whether the recipe moves scales of the inputs into the preceding norm or linear layer."""
        return False

    @property
    def own_stream(self) -> bool:
        """Whether the recipe calibrates on activations of its own quantized layers."""
        return False

    def ignores(self, module: str) -> bool:
        """Whether the module named ``module`` stays in half precision."""
        return any(matches(pattern, module) for pattern in self.ignore)


class Override(Frozen):
    """Another scheme for some of the modules."""

    modules: tuple[str, ...] = Field(min_length=1, description="Names, shell patterns, or re:REGEX.")
    scheme: IntScheme

    @field_validator("modules")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled("modules", value)


class IntRecipe(RecipeBase):
    """A recipe whose codes lie on an integer grid."""

    scheme: IntScheme
    overrides: tuple[Override, ...] = Field((), description="Schemes of their own; the first whose pattern fits.")
    format: Format

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for scheme in (self.scheme, *(override.scheme for override in self.overrides)):
            check_readable(self.name, self.format, scheme)
        if self.overrides and self.format != "compressed-tensors":
            raise ValueError(
                f"recipe {self.name!r}: overrides need format: compressed-tensors, got {self.format!r}, which has one "
                "scheme for all layers"
            )
        return self

    def scheme_of(self, module: str) -> IntScheme:
        """The scheme that the recipe wants for a module."""
        for override in self.overrides:
            if any(matches(pattern, module) for pattern in override.modules):
                return override.scheme
        return self.scheme


class GptqRecipe(IntRecipe):
    """GPTQ: second-order error compensation from the calibration Hessian."""

    method: Literal["gptq"]
    options: GptqOptions = GptqOptions()

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def needs_magnitudes(self) -> bool:
        return False

    @property
    def own_stream(self) -> bool:
        return self.options.propagate == "quantized"


class AwqRecipe(IntRecipe):
    """AWQ: input channels scaled by their activations before rounding, the scales folded into what comes before."""

    method: Literal["awq"]
    options: AwqOptions = AwqOptions()

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def folds(self) -> bool:
        return True


class SmoothQuantRecipe(IntRecipe):
    """SmoothQuant: outliers of the activations moved into the weights, then both in int8."""

    method: Literal["smoothquant"]
    options: SmoothQuantOptions = SmoothQuantOptions()

    @model_validator(mode="after")
    def _both_in_int8(self) -> Self:
        if self.scheme.activations != "int8":
            raise ValueError(
                f"recipe {self.name!r}: smoothquant is for activations in int8, got activations "
                f"{self.scheme.activations!r}; set scheme: {{bits: 8, group_size: null, activations: int8}}"
            )
        return self

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def folds(self) -> bool:
        return True


class HqqRecipe(IntRecipe):
    """HQQ: zero points that make an l_p norm of the weights' error small; no calibration text."""

    method: Literal["hqq"]
    options: HqqOptions = HqqOptions()

    @model_validator(mode="after")
    def _has_zero_points(self) -> Self:
        if self.scheme.symmetric:
            raise ValueError(f"recipe {self.name!r}: hqq chooses zero points; set scheme.symmetric: false")
        return self


class RtnRecipe(RecipeBase):
    """Round to nearest."""

    method: Literal["rtn"]
    scheme: AnyLinearScheme
    format: Format
    options: RtnOptions = RtnOptions()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_readable(self.name, self.format, self.scheme)
        return self

    @property
    def calibrated(self) -> bool:
        return isinstance(self.scheme, Float8Scheme) and self.scheme.activations == "static"

    def scheme_of(self, module: str) -> LinearScheme:
        """The scheme that the recipe wants for a module."""
        return self.scheme


class BitsAndBytesRecipe(RecipeBase):
    """bitsandbytes: the library's own kernels, its own serialized form."""

    method: Literal["bitsandbytes"]
    scheme: Annotated[FourBitFloatScheme | LlmInt8Scheme, Field(discriminator="type")]
    format: Format = "bitsandbytes"
    options: NoOptions = NoOptions()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_readable(self.name, self.format, self.scheme)
        return self


LinearRecipe = GptqRecipe | RtnRecipe | AwqRecipe | SmoothQuantRecipe | HqqRecipe
Recipe = Annotated[LinearRecipe | BitsAndBytesRecipe, Field(discriminator="method")]

# Raised by one whenever a change alters the bytes that a method writes: old artifacts are then made again.
NUMERICS_VERSION: dict[str, int] = {
    "gptq": 2,
    "rtn": 1,
    "awq": 1,
    "smoothquant": 1,
    "hqq": 1,
    "bitsandbytes": 1,
}


def check_readable(name: str, fmt: str, scheme: Scheme) -> None:
    """Refuse a scheme that the format can't hold.

    Raises:
        ValueError: naming both, and the formats that can.
    """
    if format_holds(fmt, scheme):
        return
    fits = [other for other in FORMAT_HOLDS if format_holds(other, scheme)]
    wanted = scheme.model_dump_json(exclude={"indivisible"})
    remedy = f"choose format: {' or '.join(fits)}" if fits else "no format that a runtime reads holds it"
    raise ValueError(
        f"recipe {name!r}: format {fmt!r} can't hold the scheme {wanted} (it holds {FORMAT_HOLDS[fmt]}); {remedy}"
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a module name fits a pattern of a recipe."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _compiled(field: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is no regular expression ({error}); mend it") from error
    return patterns
