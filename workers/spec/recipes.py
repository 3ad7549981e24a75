"""Recipes: a method, a scheme and a format each, and the valid combinations.

The method chooses the codes, the scheme is the codes' grid, and the format is how they are stored. Frozen, unknown keys
refused. No torch: the driver imports it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from workers.spec import plugins
from workers.spec.formats import BITSANDBYTES, FORMATS, GGUF, HF_QUANTIZER, FormatName, check_holds
from workers.spec.libraries import LIBRARIES, LibraryName, check_makes
from workers.spec.options import (
    AwqOptions,
    BitsAndBytesOptions,
    GgufOptions,
    GptqOptions,
    HqqOptions,
    LibraryOptions,
    NoOptions,
    RtnOptions,
    SmoothQuantOptions,
)
from workers.spec.patterns import matches as matches
from workers.spec.recipe_base import (
    CodedRecipe,
    GridRecipe,
    IntRecipe,
    PassNeeds,
    RecipeBase,
    check_block,
    static_inputs,
)
from workers.spec.schemes import (
    AnyLinearScheme,
    FourBitFloatScheme,
    GgufScheme,
    IntScheme,
    KeptScheme,
    LinearScheme,
    LlmInt8Scheme,
    TransformersScheme,
    has_tensor_scale,
)


class GptqRecipe(GridRecipe):
    """GPTQ: second-order error compensation from the calibration Hessian; on integers, or on E2M1 numbers."""

    numerics: ClassVar[int] = 2

    method: Literal["gptq"]
    options: GptqOptions = GptqOptions()

    @property
    def needs(self) -> PassNeeds:
        """Statistics, from its own quantized layers if ``propagate`` is ``quantized``."""
        return PassNeeds(
            statistics=True,
            magnitudes=static_inputs(self.scheme),
            own_stream=self.options.propagate == "quantized",
            final=self.outside is not None,
            keys_and_values=self.kv_cache is not None,
        )


class AwqRecipe(IntRecipe):
    """AWQ: scales input channels by their activations before rounding; folds the scales into the preceding module."""

    method: Literal["awq"]
    options: AwqOptions = AwqOptions()

    @property
    def needs(self) -> PassNeeds:
        """Statistics, magnitudes and folds."""
        return PassNeeds(
            statistics=True,
            magnitudes=True,
            folds=True,
            final=self.outside is not None,
            keys_and_values=self.kv_cache is not None,
        )


class SmoothQuantRecipe(IntRecipe):
    """SmoothQuant: moves outliers of the activations into the weights, then quantizes both to int8."""

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
    def needs(self) -> PassNeeds:
        """Statistics, magnitudes and folds."""
        cached = self.kv_cache is not None
        return PassNeeds(statistics=True, magnitudes=True, folds=True, keys_and_values=cached)


class HqqRecipe(IntRecipe):
    """HQQ: zero points that minimize an l_p norm of the weights' error; no calibration text."""

    method: Literal["hqq"]
    options: HqqOptions = HqqOptions()

    @property
    def needs(self) -> PassNeeds:
        """The weights alone, unless keys and values have scales."""
        cached = self.kv_cache is not None
        return PassNeeds(statistics=cached, keys_and_values=cached)

    @model_validator(mode="after")
    def _has_zero_points(self) -> Self:
        if self.scheme.symmetric:
            raise ValueError(f"recipe {self.name!r}: hqq chooses zero points; set scheme.symmetric: false")
        return self


class PluginRecipe(IntRecipe):
    """A method that a plugin adds (``spec.plugins.add_method``), on integer grids."""

    method: str = Field(
        description="One that a plugin adds.", json_schema_extra=lambda schema: schema.update(enum=[*plugins.METHODS])
    )
    options: dict[str, JsonValue] = Field({}, description="As the plugin's solver takes them.")

    @property
    def revision(self) -> int:
        """As the plugin counts."""
        return plugins.METHODS[self.method].numerics

    @property
    def needs(self) -> PassNeeds:
        """Statistics, if the plugin says so, or keys and values have scales."""
        cached = self.kv_cache is not None
        return PassNeeds(statistics=plugins.METHODS[self.method].calibrated or cached, keys_and_values=cached)


class RtnRecipe(CodedRecipe):
    """Round to nearest."""

    method: Literal["rtn"]
    scheme: AnyLinearScheme
    options: RtnOptions = RtnOptions()

    @property
    def revision(self) -> int:
        """Raised by one for schemes with a scale for each tensor, which what runtimes fuse shares since then."""
        return self.numerics + has_tensor_scale(self.scheme)

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_holds(self.name, self.format, self.scheme)
        check_block(self, self.scheme)
        return self

    @property
    def needs(self) -> PassNeeds:
        """Statistics and magnitudes, if activations have static scales."""
        static, cached = static_inputs(self.scheme), self.kv_cache is not None
        return PassNeeds(statistics=static or cached, magnitudes=static, keys_and_values=cached)

    def scheme_of(self, module: str) -> LinearScheme:
        """The recipe's scheme for a module."""
        return self.scheme_outside(module) or self.scheme


class BitsAndBytesRecipe(RecipeBase):
    """bitsandbytes: the library's own kernels and serialized form."""

    engine: ClassVar[str] = "bitsandbytes"

    method: Literal["bitsandbytes"]
    scheme: Annotated[FourBitFloatScheme | LlmInt8Scheme, Field(discriminator="type")]
    format: FormatName = BITSANDBYTES.name
    options: BitsAndBytesOptions = BitsAndBytesOptions()

    @model_validator(mode="after")
    def _of_four_bits(self) -> Self:
        plain = BitsAndBytesOptions(fp32_cpu_offload=self.options.fp32_cpu_offload)
        given = [
            name for name in ("compute_dtype", "quant_storage") if getattr(self.options, name) != getattr(plain, name)
        ]
        if given and isinstance(self.scheme, LlmInt8Scheme):
            raise ValueError(
                f"recipe {self.name!r}: options.{given[0]} is for layers of 4 bits, got scheme.type 'llm-int8', which "
                "computes in float16 and stores int8; remove it, or set scheme.type: nf4"
            )
        return self

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_holds(self.name, self.format, self.scheme)
        return self

    def scheme_of(self, module: str) -> FourBitFloatScheme | LlmInt8Scheme:
        """The recipe's scheme for a module."""
        return self.scheme


class GgufRecipe(RecipeBase):
    """GGUF: types and scales as llama.cpp chooses them with the importance matrix, codes solved under the Hessian."""

    engine: ClassVar[str] = "ggml"
    numerics: ClassVar[int] = 2

    method: Literal["ggml"]
    scheme: GgufScheme
    format: FormatName = GGUF.name
    options: GgufOptions = GgufOptions()
    ignore: tuple[str, ...] = Field((), description="Modules left as they are: names, shell patterns, or re:REGEX.")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_holds(self.name, self.format, self.scheme)
        return self

    @property
    def needs(self) -> PassNeeds:
        """Statistics, whose diagonal is the importance matrix, and those of the head's input."""
        return PassNeeds(statistics=True, final=True)

    def scheme_of(self, module: str) -> GgufScheme:
        """The recipe's scheme for a module."""
        return self.scheme


class KeepRecipe(RecipeBase):
    """Conversion of a source that is quantized already: its codes, scales and zero points in another format.

    ``scheme`` and ``ignore`` are the source's, set by the plan (``spec.kept``), as is ``source``.
    """

    engine: ClassVar[str] = "keep"

    method: Literal["keep"]
    scheme: Annotated[KeptScheme | IntScheme | GgufScheme, Field(discriminator="type")] = KeptScheme()
    format: FormatName
    options: NoOptions = NoOptions()
    ignore: tuple[str, ...] = Field((), description="Modules that the source doesn't quantize; set by the plan.")
    source: str | None = Field(None, description="The source's format; set by the plan.")

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.include is not None or self.layers is not None:
            raise ValueError(
                f"recipe {self.name!r}: method keep stores what the source has quantized; remove include and layers"
            )
        if not FORMATS[self.format].keeps:
            able = " or ".join(row.name for row in FORMATS.values() if row.keeps)
            raise ValueError(
                f"recipe {self.name!r}: method keep writes integers in groups, which the format {self.format!r} can't "
                f"hold; choose format: {able}"
            )
        return self

    def scheme_of(self, module: str) -> KeptScheme | IntScheme | GgufScheme:
        """The recipe's scheme for a module."""
        return self.scheme


class TransformersRecipe(RecipeBase):
    """A quantizer of the installed transformers: the library loads, quantizes and saves the whole model."""

    engine: ClassVar[str] = "transformers"

    method: Literal["transformers"]
    scheme: TransformersScheme
    format: FormatName = HF_QUANTIZER.name
    options: NoOptions = NoOptions()

    @model_validator(mode="after")
    def _readable(self) -> Self:
        check_holds(self.name, self.format, self.scheme)
        return self

    def scheme_of(self, module: str) -> TransformersScheme:
        """The recipe's scheme for a module."""
        return self.scheme


class LibraryRecipe(RecipeBase):
    """A recipe whose ``engine`` is a library, which makes the whole artifact in an environment of its own."""

    engine: LibraryName = Field(description="The library that makes it, instead of quantmill.")
    method: Literal["gptq", "awq", "rtn", "autoround"] = Field(description="The library's; each has some of them.")
    scheme: AnyLinearScheme
    format: FormatName
    options: LibraryOptions = LibraryOptions()

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        check_holds(self.name, self.format, self.scheme)
        given = self.options.model_dump(exclude_defaults=True)
        check_makes(self.name, self.engine, self.method, self.format, self.scheme, given)
        return self

    @property
    def needs(self) -> PassNeeds:
        """A calibration text, if the library's method takes one, or inputs have fixed scales."""
        static = getattr(self.scheme, "activations", None) == "static"
        return PassNeeds(statistics=static or LIBRARIES[self.engine][self.method].calibrated)

    def scheme_of(self, module: str) -> LinearScheme:
        """The recipe's scheme for a module."""
        return self.scheme


def _made_by(value: object) -> str:
    """Whether a recipe names an engine, or a plugin's method: its discriminator, before ``method``."""
    if isinstance(value, dict):
        by_a_plugin = isinstance(value.get("method"), str) and value["method"] in plugins.METHODS
        return "by-a-library" if "engine" in value else "by-a-plugin" if by_a_plugin else "by-method"
    if isinstance(value, LibraryRecipe):
        return "by-a-library"
    return "by-a-plugin" if isinstance(value, PluginRecipe) else "by-method"


OwnLinearRecipe = GptqRecipe | RtnRecipe | AwqRecipe | SmoothQuantRecipe | HqqRecipe
LinearRecipe = OwnLinearRecipe | PluginRecipe
OwnRecipe = Annotated[
    OwnLinearRecipe | BitsAndBytesRecipe | GgufRecipe | KeepRecipe | TransformersRecipe, Field(discriminator="method")
]
OWN_METHODS = tuple(get_args(each.model_fields["method"].annotation)[0] for each in get_args(get_args(OwnRecipe)[0]))
Recipe = Annotated[
    Annotated[OwnRecipe, Tag("by-method")]
    | Annotated[LibraryRecipe, Tag("by-a-library")]
    | Annotated[PluginRecipe, Tag("by-a-plugin")],
    Discriminator(_made_by),
]


def nearest(recipe: LinearRecipe) -> RtnRecipe:
    """The recipe with its scheme and format, and rounding to nearest as its method."""
    return RtnRecipe(name=recipe.name, method="rtn", scheme=recipe.scheme, format=recipe.format)


def words(recipe: Recipe) -> str:
    """A recipe's scheme in words, with the bit widths of its overrides, and whether embeddings and head have one."""
    overrides = recipe.overrides if isinstance(recipe, GridRecipe) else ()
    outside = ", embeddings and head too" if isinstance(recipe, CodedRecipe) and recipe.outside else ""
    cached = ", keys and values in FP8" if isinstance(recipe, CodedRecipe) and recipe.kv_cache else ""
    others = {override.scheme.bits for override in overrides}
    scheme = recipe.scheme.words(others) if isinstance(recipe.scheme, IntScheme) else recipe.scheme.words()
    return f"{scheme}{outside}{cached}"
