"""The quantization schemes: the codes' grid, their scales, and the rounding of activations."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from workers.spec.base import Frozen, canonical_json
from workers.spec.ggml import FILE_TYPES, Kind, Mix

# Rows and columns of a block of weights that share an fp8 scale (as in DeepSeek-V3).
FP8_BLOCK = 128


class IntScheme(Frozen):
    """Weights on an integer grid with one scale for each group of input columns."""

    type: Literal["int"] = "int"
    bits: int = Field(ge=2, le=8, description="Of a weight's code; scales come on top.")
    group_size: int | None = Field(128, ge=1, description="Input columns that share a scale; null: a whole row.")
    symmetric: bool = Field(True, description="true: no zero points; false: one for each scale.")
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

    def words(self, others: Collection[int] = ()) -> str:
        """The scheme in words; ``others`` are the bit widths of layers that deviate."""
        groups = f"one scale for each {self.group_size} inputs" if self.group_size else "one scale for each output"
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        deviating = sorted(set(others) - {self.bits})
        some = f" ({' and '.join(map(str, deviating))} bits for some layers)" if deviating else ""
        inputs = ", activations in 8-bit integers" if self.activations == "int8" else ""
        return f"{self.bits}-bit integers{some}, {symmetry}, {groups}{inputs}"


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

    def words(self) -> str:
        """The scheme in words."""
        each = {"tensor": "tensor", "channel": "output", "block": f"block of {FP8_BLOCK} x {FP8_BLOCK}"}[self.scales]
        also = {"none": "", "dynamic": ", activations too", "static": ", activations too, by fixed scales"}
        return f"FP8 (E4M3), one scale for each {each}{also[self.activations]}"


class MicroscalingScheme(Frozen):
    """Floats with small groups: MXFP4, MXFP8 (OCP Microscaling 1.0) or NVFP4.

    mxfp4: E2M1, a power of two for each 32 weights. mxfp8: the same with E4M3. nvfp4: E2M1, an E4M3 scale for each 16,
    and one float32 scale for the tensor.
    """

    type: Literal["mxfp4", "nvfp4", "mxfp8"] = Field(description="The numbers, and with them the size of a group.")
    activations: Literal["none", "dynamic"] = Field(
        "none",
        description="dynamic: groups of each token's inputs are rounded as the weights are while the model runs; for "
        "nvfp4 under one scale for each layer's input, from the calibration text.",
    )

    @property
    def group_size(self) -> int:
        return 16 if self.type == "nvfp4" else 32

    @property
    def family(self) -> str:
        return f"{self.type}-w4a4" if self.activations == "dynamic" and self.type != "mxfp8" else self.type

    def words(self) -> str:
        """The scheme in words."""
        also = ", activations too" if self.activations == "dynamic" else ""
        return f"{self.type.upper()}, one scale for each {self.group_size} inputs{also}"


class FourBitFloatScheme(Frozen):
    """bitsandbytes' 4-bit codebooks: NF4 (arXiv 2305.14314) or FP4, one absmax for each block of 64."""

    type: Literal["nf4", "fp4"] = Field(description="The codebook.")
    double_quantization: bool = Field(True, description="Store the absmax values themselves in 8 bits.")

    @property
    def family(self) -> str:
        return self.type

    def words(self) -> str:
        """The scheme in words."""
        return f"{self.type.upper()}{', double quantization' if self.double_quantization else ''}"


class LlmInt8Scheme(Frozen):
    """LLM.int8() (arXiv 2208.07339): int8 rows, outlier columns of the activations in half precision."""

    type: Literal["llm-int8"] = "llm-int8"
    outlier_threshold: float = Field(6.0, ge=0, description="Inputs of a larger magnitude stay in half precision.")

    @property
    def family(self) -> str:
        return "llm-int8"

    def words(self) -> str:
        """The scheme in words."""
        return "LLM.int8(), rows of 8-bit integers"


class GgufScheme(Frozen):
    """A mix of ggml's types, chosen for each tensor as llama.cpp chooses it; the name is that of its quantize tool."""

    type: Literal["gguf-mix"] = "gguf-mix"
    mix: Mix = Field(description="The name of the type in llama.cpp's quantize tool, in lower case.")

    @property
    def family(self) -> str:
        return FILE_TYPES[self.mix].family

    def words(self) -> str:
        """The scheme in words."""
        return f"{self.mix.upper()}, a type for each tensor as llama.cpp chooses it"


class GgmlScheme(Frozen):
    """One of ggml's types, in which a layer is stored."""

    type: Literal["ggml"] = "ggml"
    kind: Kind

    @property
    def family(self) -> str:
        return f"w{self.kind.removeprefix('i')[1]}"

    def words(self) -> str:
        """The scheme in words."""
        return self.kind.upper()


class KeptScheme(Frozen):
    """The scheme of the source, which is quantized already; the plan replaces it by what the target stores."""

    type: Literal["kept"] = "kept"

    @property
    def family(self) -> str:
        return "kept"

    def words(self) -> str:
        """The scheme in words."""
        return "the source's codes, scales and zero points"


class Expected(Frozen):
    """What to expect of a quantizer of transformers: how it is judged, and the size of what it stores.

    Nothing of the artifact depends on it; the plan's size and the gates do.
    """

    family: str = Field("w4", description="Whose thresholds judge it (configs/gates.yaml).")
    bits: int = Field(8, ge=1, le=16, description="Stored for each weight, without scales.")
    group_size: int | None = Field(None, ge=1, description="Input columns that share scales; null: a whole row.")
    group_bits: int = Field(32, ge=0, description="Stored for each group: scales and zero points.")


class TransformersScheme(Frozen):
    """What one of transformers' own quantizers makes, by the class of its config and that class's arguments."""

    type: Literal["transformers"] = "transformers"
    config: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9]*Config$", description="A class of transformers: TorchAoConfig.")
    arguments: dict[str, Any] = Field(
        {}, description="The class's arguments, as config.json's quantization_config has them."
    )
    packages: tuple[str, ...] = Field((), description="Distributions that the quantizer needs, by their names on PyPI.")
    expected: Expected = Expected()

    def __hash__(self) -> int:
        return hash((self.config, canonical_json(self.arguments)))

    @property
    def family(self) -> str:
        return self.expected.family

    def words(self) -> str:
        """The scheme in words: the config, with the names and numbers among its arguments."""
        return " ".join([self.config, *_leaves(self.arguments)])


def _leaves(value: Any) -> list[str]:
    """The names and numbers in nested arguments, without the keys that torchao puts around them."""
    match value:
        case dict():
            inner = {key: item for key, item in value.items() if key != "_version"}
            return [word for key, item in inner.items() for word in _named(key, item)]
        case list() | tuple():
            return [word for item in value for word in _leaves(item)]
    return [str(value)]


def _named(key: str, value: Any) -> list[str]:
    wrapped = key.startswith("_") or key in ("default", "quant_type") or isinstance(value, dict | list)
    return _leaves(value) if wrapped else [f"{key}={value}"]


# What keys and values are rounded to before runtimes cache them: E4M3, with one scale for each layer's keys, one for
# its values.
CacheScheme = Literal["fp8"]
LinearScheme = IntScheme | Float8Scheme | MicroscalingScheme


def has_tensor_scale(scheme: Scheme) -> bool:
    """Whether a scale belongs to a whole tensor: what runtimes fuse must share it, for they keep one of them."""
    match scheme:
        case Float8Scheme(scales="tensor") | MicroscalingScheme(type="nvfp4"):
            return True
    return False


def _kind(value: object) -> str:
    """The discriminator of a value's scheme class; int by default."""
    type_name = value.get("type", "int") if isinstance(value, dict) else getattr(value, "type", "int")
    return {"fp8": "fp8", **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), "microscaling")}.get(type_name, "int")


AnyLinearScheme = Annotated[
    Annotated[IntScheme, Tag("int")]
    | Annotated[Float8Scheme, Tag("fp8")]
    | Annotated[MicroscalingScheme, Tag("microscaling")],
    Discriminator(_kind),
]
GridScheme = Annotated[
    Annotated[IntScheme, Tag("int")] | Annotated[MicroscalingScheme, Tag("microscaling")], Discriminator(_kind)
]
Scheme = LinearScheme | FourBitFloatScheme | LlmInt8Scheme | GgufScheme | GgmlScheme | KeptScheme | TransformersScheme

AnyScheme = Annotated[
    IntScheme
    | Float8Scheme
    | MicroscalingScheme
    | FourBitFloatScheme
    | LlmInt8Scheme
    | GgufScheme
    | GgmlScheme
    | TransformersScheme,
    Field(discriminator="type"),
]
