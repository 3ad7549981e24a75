"""Recipes: a method, a scheme and a format each, and the valid combinations.

The method chooses the codes, the scheme is the codes' grid, and the format is how they are stored. Frozen, unknown keys
refused. No torch: the driver imports it.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationInfo, field_validator, model_validator

from workers.spec import plugins
from workers.spec.base import SLUG, Frozen
from workers.spec.formats import (
    BITSANDBYTES,
    FORMATS,
    GGUF,
    HF_QUANTIZER,
    FormatName,
    check_holds,
    formats_with_schemes_by_layer,
)
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
from workers.spec.patterns import LAYERS, compiled, is_among, layer_of
from workers.spec.patterns import matches as matches
from workers.spec.schemes import (
    AnyLinearScheme,
    CacheScheme,
    Float8Scheme,
    FourBitFloatScheme,
    GgufScheme,
    GridScheme,
    IntScheme,
    KeptScheme,
    LinearScheme,
    LlmInt8Scheme,
    MicroscalingScheme,
    TransformersScheme,
    has_tensor_scale,
)

IGNORED_BY_DEFAULT = (
    "lm_head",
    "*.router",
    "*.router.*",
    "*.mlp.gate",
    "*.block_sparse_moe.gate",
    "*.shared_expert_gate",
    "*.dt_proj",
)


class PassNeeds(NamedTuple):
    """A recipe's needs from a pass over the model; by default the weights alone.

    ``statistics``: X^T X of every layer's inputs, from the calibration text. ``magnitudes``: the inputs' mean and
    maximum magnitudes as well. ``folds``: the layers' folds, which move scales of inputs into the preceding module.
    ``own_stream``: hidden states from the recipe's own quantized layers. ``final``: X^T X of the last hidden states.
    ``keys_and_values``: their largest magnitudes.
    """

    statistics: bool = False
    magnitudes: bool = False
    folds: bool = False
    own_stream: bool = False
    final: bool = False
    keys_and_values: bool = False


# Names of modules outside of the layers, without the model's prefix.
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")


class Outside(Frozen):
    """Schemes of the matrices outside of the layers; null: left as they are.

    A model that uses one matrix for both has the embeddings' scheme.
    """

    embeddings: AnyLinearScheme | None = Field(None, description="The input embeddings'.")
    head: AnyLinearScheme | None = Field(None, description="The head's, whatever `ignore` says.")


class RecipeBase(Frozen):
    """The fields of every recipe, whatever its method.

    ``numerics`` is incremented whenever a change alters the bytes that the method writes, so that old artifacts are
    made again. Every recipe has an ``engine``, which names the row of ``spec.engines`` that makes the artifact.
    """

    numerics: ClassVar[int] = 1

    @property
    def revision(self) -> int:
        """The numerics of this recipe: ``numerics``, raised where they changed for its scheme alone."""
        return self.numerics

    name: str = Field(pattern=SLUG.pattern, max_length=64, description="In tables, folders and repositories.")
    description: str = Field("", description="A sentence for people; no part of what is made.")
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

    include: tuple[str, ...] | None = Field(
        None, description="Modules that are quantized, by the same patterns; null: all but those of `ignore`."
    )
    layers: str | None = Field(
        None, pattern=LAYERS, description="Layers that are quantized, as in 0-3,-1; null: all. -1 is the last."
    )

    @field_validator("ignore", "include")
    @classmethod
    def _compiles(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        return None if value is None else compiled(str(info.field_name), value)

    @model_validator(mode="after")
    def _outside_is_named_outside(self) -> Self:
        for pattern in self.include or ():
            if HEAD.search(pattern) or EMBEDDINGS.search(pattern):
                able = " or ".join(row.name for row in FORMATS.values() if row.outside)
                part = "head" if HEAD.search(pattern) else "embeddings"
                raise ValueError(
                    f"recipe {self.name!r}: include: {pattern!r} is outside of the layers; set outside: {{{part}: "
                    f"{{bits: 8, group_size: 64}}}} with format: {able}, the only one that holds it"
                )
        return self

    @property
    def needs(self) -> PassNeeds:
        """The recipe's needs from a pass over the model."""
        return PassNeeds()

    @property
    def calibrated(self) -> bool:
        """Whether the recipe needs statistics of a calibration text."""
        return self.needs.statistics

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns of module names in the recipe."""
        return (*self.ignore, *(self.include or ()))

    def scheme_outside(self, module: str) -> LinearScheme | None:
        """The scheme of a module outside of the layers; None if it stays as it is."""
        return None

    def ignores(self, module: str) -> bool:
        """Whether the module named ``module`` stays in half precision."""
        return self.why_ignored(module) is not None

    def why_ignored(self, module: str) -> str | None:
        """What leaves a module in half precision: a field of the recipe, with its value; None if nothing does.

        ``layers`` has no numbers from the end here: the plan resolves them by the model's layers.
        """
        if pattern := next((pattern for pattern in self.ignore if matches(pattern, module)), None):
            return f"ignore: {pattern}"
        if self.include is not None and not any(matches(pattern, module) for pattern in self.include):
            return f"include: {', '.join(self.include) or 'nothing'}"
        number = layer_of(f"{module}.")
        if self.layers is not None and number is not None and not is_among(self.layers, int(number)):
            return f"layers: {self.layers}"
        return None


class Override(Frozen):
    """Another scheme for some modules."""

    modules: tuple[str, ...] = Field(min_length=1, description="Names, shell patterns, or re:REGEX.")
    scheme: IntScheme

    @field_validator("modules")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return compiled("modules", value)


def _check_block(recipe: GridRecipe | RtnRecipe) -> None:
    """Refuse scales of inputs for a speculative block, through which no calibration text passes.

    Raises:
        ValueError: the recipe quantizes one, and its scheme has such scales.
    """
    if recipe.mtp == "quantize" and _static_inputs(recipe.scheme):
        raise ValueError(
            f"recipe {recipe.name!r}: mtp: quantize: the scheme has fixed scales of inputs, which calibration gives, "
            "and no text passes through the speculative block; choose activations: dynamic (fp8) or none, or mtp: keep"
        )


def _static_inputs(scheme: LinearScheme) -> bool:
    """Whether a layer's input has a scale that is fixed by the calibration text."""
    match scheme:
        case Float8Scheme(activations="static") | MicroscalingScheme(type="nvfp4", activations="dynamic"):
            return True
    return False


class CodedRecipe(RecipeBase):
    """A recipe whose codes are ours, and stored in a format."""

    engine: ClassVar[str] = "linear"

    format: FormatName
    outside: Outside | None = Field(None, description="Schemes of embeddings and head; null: left as they are.")
    kv_cache: CacheScheme | None = Field(
        None,
        description="fp8: with a scale for each layer's keys and one for its values, from the calibration text, with "
        "which runtimes keep their cache in FP8 E4M3.",
    )
    mtp: Literal["keep", "quantize"] = Field(
        "keep",
        description="The speculative block (MTP), which predicts further tokens: keep: as it is; quantize: those of "
        "its linear layers that have a decoder layer's names and shapes, rounded to nearest in the recipe's scheme.",
    )

    @model_validator(mode="after")
    def _speculative_readable(self) -> Self:
        if self.mtp == "keep":
            return self
        if not FORMATS[self.format].speculative:
            able = " or ".join(row.name for row in FORMATS.values() if row.speculative)
            raise ValueError(
                f"recipe {self.name!r}: mtp: quantize: the format {self.format!r} is read for the model's own layers "
                f"alone; choose format: {able}, or mtp: keep"
            )
        return self

    @property
    def revision(self) -> int:
        """Raised by one for embeddings that are solved: what the first layer makes of them counts since then."""
        return self.numerics + (self.needs.final and self.outside is not None and self.outside.embeddings is not None)

    @model_validator(mode="after")
    def _cache_readable(self) -> Self:
        if self.kv_cache and FORMATS[self.format].cache_declaration is None:
            able = " or ".join(row.name for row in FORMATS.values() if row.cache_declaration)
            raise ValueError(
                f"recipe {self.name!r}: kv_cache: the format {self.format!r} has no scales of keys and values; choose "
                f"format: {able}, or leave kv_cache out"
            )
        return self

    @model_validator(mode="after")
    def _outside_readable(self) -> Self:
        schemes = [scheme for scheme in (self.outside.embeddings, self.outside.head) if scheme] if self.outside else []
        if schemes and not FORMATS[self.format].outside:
            able = " or ".join(row.name for row in FORMATS.values() if row.outside)
            raise ValueError(
                f"recipe {self.name!r}: outside: embeddings and head stay as they are in the format {self.format!r}; "
                f"choose format: {able}, or leave outside out"
            )
        for scheme in schemes:
            check_holds(self.name, self.format, scheme)
        return self

    def scheme_outside(self, module: str) -> LinearScheme | None:
        """The scheme of a module outside of the layers; None if it stays as it is."""
        if self.outside is None:
            return None
        if EMBEDDINGS.search(module):
            return self.outside.embeddings
        return self.outside.head if HEAD.search(module) else None


class GridRecipe(CodedRecipe):
    """A recipe with codes on a grid of integers, or of E2M1 numbers."""

    scheme: GridScheme
    overrides: tuple[Override, ...] = Field((), description="Schemes of their own; the first whose pattern fits.")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for scheme in (self.scheme, *(override.scheme for override in self.overrides)):
            check_holds(self.name, self.format, scheme)
        _check_block(self)
        if self.overrides and not FORMATS[self.format].per_layer_schemes:
            raise ValueError(
                f"recipe {self.name!r}: overrides need {formats_with_schemes_by_layer()}, got {self.format!r}, which "
                "has one scheme for all layers"
            )
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns of module names in the recipe."""
        return (*super().patterns, *(pattern for override in self.overrides for pattern in override.modules))

    def scheme_of(self, module: str) -> LinearScheme:
        """The recipe's scheme for a module."""
        if outside := self.scheme_outside(module):
            return outside
        for override in self.overrides:
            if any(matches(pattern, module) for pattern in override.modules):
                return override.scheme
        return self.scheme


class IntRecipe(GridRecipe):
    """A recipe with codes on an integer grid."""

    scheme: IntScheme


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
            magnitudes=_static_inputs(self.scheme),
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
        _check_block(self)
        return self

    @property
    def needs(self) -> PassNeeds:
        """Statistics and magnitudes, if activations have static scales."""
        static, cached = _static_inputs(self.scheme), self.kv_cache is not None
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


LinearRecipe = GptqRecipe | RtnRecipe | AwqRecipe | SmoothQuantRecipe | HqqRecipe | PluginRecipe
OwnRecipe = Annotated[
    GptqRecipe
    | RtnRecipe
    | AwqRecipe
    | SmoothQuantRecipe
    | HqqRecipe
    | BitsAndBytesRecipe
    | GgufRecipe
    | KeepRecipe
    | TransformersRecipe,
    Field(discriminator="method"),
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
