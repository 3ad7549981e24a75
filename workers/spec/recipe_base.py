"""What recipes of all methods have: which modules they take, what they need of a pass, and how their codes are kept.

Frozen, unknown keys refused. No torch: the driver imports it.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from workers.spec.base import SLUG, Frozen
from workers.spec.formats import FORMATS, FormatName, check_holds, formats_with_schemes_by_layer
from workers.spec.patterns import LAYERS, compiled, is_among, layer_of, matches
from workers.spec.schemes import (
    AnyLinearScheme,
    CacheScheme,
    Float8Scheme,
    GridScheme,
    IntScheme,
    LinearScheme,
    MicroscalingScheme,
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


def check_block(recipe: CodedRecipe, scheme: LinearScheme) -> None:
    """Refuse scales of inputs for a speculative block, through which no calibration text passes.

    Raises:
        ValueError: the recipe quantizes one, and its scheme has such scales.
    """
    if recipe.mtp == "quantize" and static_inputs(scheme):
        raise ValueError(
            f"recipe {recipe.name!r}: mtp: quantize: the scheme has fixed scales of inputs, which calibration gives, "
            "and no text passes through the speculative block; choose activations: dynamic (fp8) or none, or mtp: keep"
        )


def static_inputs(scheme: LinearScheme) -> bool:
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
        check_block(self, self.scheme)
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
