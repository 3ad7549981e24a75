"""Model and load the zoo file (models x recipes, calibration, gates, publishing), validated once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from pipeline.zoo import gating, shipped
from pipeline.zoo.gating import Gates
from pipeline.zoo.problems import explain
from workers.errors import PluginError, ZooError
from workers.spec import plugins
from workers.spec.base import SLUG, Frozen, meant
from workers.spec.bounded_yaml import BadYaml, parse_yaml
from workers.spec.bounds import ZOO_BYTES
from workers.spec.data import Calibration, Dataset, SpecialTokens, Verification
from workers.spec.engines import ENGINES
from workers.spec.formats import can_be_gathered, gathered_formats
from workers.spec.job import Destination, HubLimits, Thresholds
from workers.spec.recipes import Recipe
from workers.spec.runtimes import checkers, runtime_named
from workers.transfer import destinations

LOOPBACK = "loopback"
# How repositories of a model's GGUF files are called, unless the zoo says otherwise.
GATHERED = "{model}-GGUF"


class ModelEntry(Frozen):
    """A model of the zoo: a Hub repository, or a folder relative to the zoo file."""

    model_config = ConfigDict(serialize_by_alias=True)

    id: str = Field(min_length=1, description="org/name on the Hub, or a folder (relative to this file).")
    revision: str = Field("main", description="Branch, tag or commit; a folder is pinned by its content.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    allow_pickle: bool = Field(False, description="Read pickle weights, with weights_only=True, for want of others.")
    variant: str | None = Field(
        None, pattern=r"^[\w-]+$", max_length=64, description="Variant of the weights: fp16 for model.fp16.safetensors."
    )
    as_name: str | None = Field(
        None,
        alias="as",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        max_length=96,
        description="The model's name in tables and repositories; left out: the last part of its id.",
    )
    source: Literal["original", "dequantize"] = Field(
        "original",
        description="dequantize: the model is quantized (FP8, MXFP4, compressed-tensors, gptq, awq, bitsandbytes), and "
        "what it decodes to is quantized. Families that are published so alone need no such word.",
    )
    recipes: tuple[str, ...] = Field((), description="Those of the zoo's recipes that this model gets; left out: all.")
    gates: Gates = Field({}, description="What differs for this model, by family of recipes or by recipe.")

    @field_validator("id", "revision")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("holds control characters; write the name as it is seen")
        return value


class Verify(Frozen):
    """How artifacts are compared with their reference."""

    dataset: Dataset
    tokens: int = Field(16384, ge=256, description="Held-out tokens to compare on.")
    sequence_length: int = Field(512, ge=8, description="Tokens of a sequence; at most the model's positions.")
    shown: Dataset | None = Field(
        None,
        description="Held-out rows with pictures or sounds (images, audio), whose tokens count beside the text's, for "
        "the models that take them.",
    )
    rows: int = Field(16, ge=2, description="Of shown.")
    continuations: bool = Field(
        True,
        description="Whether card and report show how beginnings of the held-out text go on; none is shown that names "
        "an address, an author or an owner.",
    )
    gates: str | Gates = Field(
        "default",
        description="A set from configs/gates.yaml, or what differs from the default one, by family of recipes (w4, "
        "nf4, ...) or by recipe.",
    )
    runtimes: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Runtimes that load each artifact, all of which must agree: transformers, vLLM, llama.cpp, mlx-lm; "
        "null: the one of each recipe's format. Those that don't read a recipe's format are left out for it.",
    )

    @field_validator("runtimes")
    @classmethod
    def _known_runtimes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Names as the rows have them, each once."""
        return None if value is None else tuple(dict.fromkeys(runtime_named(name).name for name in value))

    @field_validator("shown")
    @classmethod
    def _names_what_is_shown(cls, value: Dataset | None) -> Dataset | None:
        if value is not None and not value.shows:
            raise ValueError(f"names neither images nor audio, got {value.called!r}; name their column, or remove it")
        return value

    @model_validator(mode="after")
    def _enough_for_a_bound(self) -> Self:
        if self.tokens <= self.sequence_length:
            raise ValueError(
                f"tokens: got {self.tokens}, one sequence of {self.sequence_length}; "
                "confidence bounds take at least two: raise tokens, or lower sequence_length"
            )
        return self

    @property
    def verification(self) -> Verification:
        """The part of these settings that a worker needs."""
        return Verification(
            dataset=self.dataset,
            tokens=self.tokens,
            sequence_length=self.sequence_length,
            shown=self.shown,
            rows=self.rows,
            continuations=self.continuations,
        )

    @field_validator("gates")
    @classmethod
    def _known_set(cls, value: str | Gates) -> str | Gates:
        if isinstance(value, str) and value not in shipped.gates():
            raise ValueError(
                f"unknown set of gates, got {value!r}; configs/gates.yaml has {', '.join(shipped.gates())}; name one, "
                "or give a mapping of what differs, as {w4: {kl_mean: 0.1}}"
            )
        return value


class Publish(Frozen):
    """Where accepted artifacts go."""

    endpoint: str | None = Field(
        None,
        description="URL of a Hub, 'loopback' for the embedded one, or a folder: an absolute path or a URL of fsspec's "
        "(file:///..., s3://...); left out: HF_ENDPOINT, else the Hub.",
    )
    namespace: str = Field(
        pattern=r"^[\w.-]+$", max_length=96, description="User or organisation that owns the repositories."
    )
    name: str | None = Field(
        None,
        description="Repository name; {model} and {recipe} are filled in. Without {recipe}, a model's artifacts share "
        "one repository, which only GGUF files can. Left out: {model}-{recipe}, and {model}-GGUF for GGUF files.",
    )
    private: bool = Field(True, description="Of repositories that are made; one that stands keeps its visibility.")
    gated: Literal[False, "auto", "manual"] = Field(
        False, description="Who asks for access gets it at once (auto) or from you (manual); false: nothing is changed."
    )
    collection: str | None = Field(
        None, min_length=1, max_length=59, description="Title of a collection that the zoo's repositories are put into."
    )
    keep: int | None = Field(None, ge=1, description="Revisions of a repository whose tags stay; left out: all.")
    force: bool = Field(False, description="Overwrite what somebody else changed in a repository.")
    limits: HubLimits = Field(HubLimits(), description="How much of the Hub a run may use.")

    def destination(self, endpoint: str) -> Destination:
        """The part of these settings that a worker needs; ``endpoint`` replaces 'loopback' by the running Hub's URL."""
        terms = {"private", "gated", "keep", "force", "limits"}
        return Destination(endpoint=endpoint, **{name: getattr(self, name) for name in terms})

    @field_validator("endpoint")
    @classmethod
    def _is_a_place(cls, value: str | None) -> str | None:
        if value is None or value == "loopback":
            return value
        if "://" not in value and not value.startswith("/"):
            raise ValueError(
                "no URL, absolute path or 'loopback'; write file:///... or the path from / on for a folder"
            )
        return _without_credentials(value)

    @model_validator(mode="after")
    def _folders_have_no_gates(self) -> Self:
        endpoint = self.endpoint or "loopback"
        if endpoint != "loopback":
            lacking = destinations.settings_lacking(endpoint, {"gated": self.gated, "collection": self.collection})
            if lacking:
                kind = destinations.destination_row(endpoint).name
                raise ValueError(f"{lacking[0]}: a {kind} has none, got the endpoint {endpoint!r}; remove it")
        if self.name is not None and "{recipe}" not in self.name and not self._destination_gathers:
            raise ValueError(
                f"name: must contain {{recipe}}, got {self.name!r}: in a folder, each artifact has a place of its own"
            )
        return self

    @property
    def _destination_gathers(self) -> bool:
        return self.endpoint in (None, LOOPBACK) or destinations.destination_row(self.endpoint or "").gathers

    @field_validator("name")
    @classmethod
    def _tells_models_apart(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "{model}" not in value:
            raise ValueError("must contain {model}, or two models would share a repository")
        try:
            fields = [part[1:] for part in Formatter().parse(value) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"only {{model}} and {{recipe}} are filled in ({error}); remove the rest") from error
        for field in fields:
            if field not in (("model", "", None), ("recipe", "", None)):
                raise ValueError(f"only {{model}} and {{recipe}} are filled in, as they are; remove {field[0]!r}")
        return value

    def pattern(self, fmt: str) -> str:
        """The names of repositories of artifacts in a format."""
        if self.name is not None:
            return self.name
        return GATHERED if can_be_gathered(fmt) and self._destination_gathers else "{model}-{recipe}"

    def gathers(self, fmt: str) -> bool:
        """Whether a model's artifacts in that format share a repository."""
        return "{recipe}" not in self.pattern(fmt)

    def repo_id(self, model_name: str, recipe: Recipe) -> str:
        """``namespace/name`` of an artifact's repository."""
        return f"{self.namespace}/{self.pattern(recipe.format).format(model=model_name, recipe=recipe.name)}"


def _without_credentials(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError("holds credentials, which manifests and reports would show; give them in the environment")
    return url


NamedOrDefined = Annotated[
    Annotated[str, Tag("recipe-name")] | Annotated[Recipe, Tag("recipe-definition")],
    Discriminator(lambda value: "recipe-name" if isinstance(value, str) else "recipe-definition"),
]


# Of the form of zoo files; changes when a key gets another meaning, or goes.
VERSION = 1
# In place of a list of recipes: they are chosen for each model by the budget.
AUTO = "auto"


class Budget(Frozen):
    """What artifacts may take, and what for: by which recipes are chosen where a zoo says `recipes: auto`."""

    memory: str | None = Field(None, description="Of the card or machine that models will run on, as 16GiB or 24GB.")
    gpu: str | None = Field(
        None, description="The card, as L4 or RTX 4090: its memory, and the arithmetic that it has."
    )
    runtime: str | None = Field(None, description="What will load them: transformers, vLLM, llama.cpp or mlx-lm.")
    use: Literal["inference", "qlora", "production"] = Field(
        "inference",
        description="inference: the least loss that fits; qlora: adapters are trained on it; production: eight bits.",
    )
    best: int = Field(1, ge=1, description="Recipes of each model.")


class Zoo(Frozen):
    """A zoo: every model under every recipe."""

    version: Literal[1] = Field(1, description="Of the form of zoo files that this one is written in.")
    name: str = Field(pattern=SLUG.pattern, max_length=64, description="Of the zoo, in the names of its runs.")
    plugins: tuple[str, ...] = Field(
        (), description="Python files (relative to this file) or modules that add recipes, methods, gates and more."
    )
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="What is quantized.")
    recipes: tuple[NamedOrDefined, ...] = Field(
        min_length=1,
        description="How: names of shipped recipes (`quantmill recipes`), or definitions in place; or auto: the best "
        "for each model within the budget.",
    )
    budget: Budget | None = Field(None, description="By which recipes: auto chooses.")
    calibration: Calibration | None = Field(
        None, description="What calibrated recipes learn from; the name of a set will do. Left out: the set general."
    )
    verify: Verify
    publish: Publish | None = None
    special_tokens: SpecialTokens = Field(
        "auto",
        description="Sequences for calibration and verification begin as the model's tokenizer begins a text (auto: "
        "with BOS where it adds one), or without special tokens (none).",
    )
    storage: str | None = Field(
        None, description="A folder or URL that all nodes see: what is made is kept there until it's published."
    )

    @field_validator("recipes", mode="before")
    @classmethod
    def _chosen_already(cls, value: object) -> object:
        if value == AUTO:
            raise ValueError("auto: recipes are chosen by the plan, got no budget's choice; give the zoo as a file")
        return value

    @field_validator("calibration", mode="before")
    @classmethod
    def _set_by_name(cls, value: object) -> object:
        return shipped.filled_in(value)

    @field_validator("storage")
    @classmethod
    def _all_nodes_see_it(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith(("http://", "https://")) or ("://" not in value and not value.startswith("/")):
            raise ValueError("no absolute path, nor the URL of a folder (s3://..., gs://..., file:///...); name one")
        return _without_credentials(value)

    @property
    def resolved_recipes(self) -> tuple[Recipe, ...]:
        """The recipes, shipped ones looked up by name."""
        return tuple(shipped.recipe(item) if isinstance(item, str) else item for item in self.recipes)

    def recipes_of(self, model: ModelEntry) -> tuple[Recipe, ...]:
        """The recipes that a model gets, in the zoo's order."""
        return tuple(r for r in self.resolved_recipes if not model.recipes or r.name in model.recipes)

    def runtimes_of(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the runtimes that check a recipe's artifacts; empty where the zoo names none: its format's own."""
        if self.verify.runtimes is None:
            return ()
        return tuple(row.name for row in checkers(recipe.format, self.verify.runtimes))

    def thresholds(self, model: ModelEntry, recipe: Recipe) -> Thresholds:
        """The thresholds of an artifact: the named set's, overridden by the zoo's gates, then by the model's.

        Raises:
            ZooError: no thresholds for the recipe's family.
        """
        gates = self.verify.gates
        if isinstance(gates, str):
            return gating.thresholds(shipped.gates()[gates], [model.gates], recipe)
        return gating.thresholds(shipped.gates()["default"], [gates, model.gates], recipe)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        recipes = [item if isinstance(item, str) else item.name for item in self.recipes]
        for what, names in (("recipe", recipes), ("model", [model.id for model in self.models])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is listed twice, got {len(names)} of them; list it once")
        for model in self.models:
            unknown = sorted(set(model.recipes) - set(recipes))
            if unknown:
                raise ValueError(
                    f"model {model.id!r}: recipe {unknown[0]!r} isn't among the zoo's recipes ({', '.join(recipes)}); "
                    f"{meant(unknown[0], recipes)}add it there, or remove it here"
                )
        held_out = {self.verify.dataset, self.verify.shown}
        if self.calibration and not held_out.isdisjoint(self.calibration.datasets):
            raise ValueError("verify.dataset is the calibration data; verify on text that was not calibrated on")
        return self


def load(path: Path) -> Zoo:
    """Read a zoo file, and look up its recipe names and gates, so that mistakes show before planning.

    Raises:
        ZooError: the message names key, value and remedy of every finding.
    """
    raw = read_yaml(path)
    load_plugins(raw, path)
    return check(raw, str(path))


def load_plugins(raw: object, path: Path) -> None:
    """Import what a zoo file names as plugins, and let the run's processes do so.

    Raises:
        ZooError: one can't be imported.
    """
    named = raw.get("plugins") if isinstance(raw, dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return  # nothing, or what `check` refuses
    found = [str((path.parent / name).resolve()) if name.endswith(".py") else name for name in named]
    try:
        plugins.load(found)
    except PluginError as error:
        raise ZooError(f"{path}: {error}") from None
    plugins.bequeath(found)


def check(raw: object, path: str) -> Zoo:
    """The zoo that a parsed zoo file holds; ``path`` begins messages.

    Raises:
        ZooError: see ``load``.
    """
    if not isinstance(raw, dict):
        raise ZooError(f"{path}: expected a mapping with name, models, recipes, verify; got {_kind(raw)}")
    if (version := raw.get("version", VERSION)) != VERSION:
        raise ZooError(
            f"{path}: version: got {version!r}, and this quantmill reads version {VERSION} of zoo files; upgrade "
            "quantmill for a later one, or write the zoo in this one's keys (`quantmill schema`) and its version"
        )
    try:
        zoo = Zoo.model_validate(raw)
    except ValidationError as error:
        raise ZooError(explain(error, path, raw, Zoo)) from error
    for where, gates in _gates(zoo):
        if unknown := gating.unknown_keys(gates, zoo.resolved_recipes):
            families = sorted({recipe.scheme.family for recipe in zoo.resolved_recipes})
            known = [*families, *(recipe.name for recipe in zoo.resolved_recipes)]
            raise ZooError(
                f"{path}: {where}: {unknown[0]!r} is neither a recipe of the zoo nor the family of one "
                f"({', '.join(families)}); {meant(unknown[0], known)}correct or remove it"
            )
    for recipe in zoo.resolved_recipes:
        if zoo.publish and zoo.publish.gathers(recipe.format) and not can_be_gathered(recipe.format):
            raise ZooError(
                f"{path}: publish.name: must contain {{recipe}}, got {zoo.publish.name!r}: artifacts in the format "
                f"{recipe.format!r} (recipe {recipe.name!r}) have files of the same names, and only "
                f"{' or '.join(gathered_formats())} files can share a repository; leave publish.name out "
                f"({GATHERED} for those, {{model}}-{{recipe}} for others), or give each its own zoo"
            )
        for model in zoo.models:
            zoo.thresholds(model, recipe)
        whole = recipe.calibrated and ENGINES[recipe.engine].script is not None
        if whole and zoo.calibration and zoo.calibration.uneven:
            raise ZooError(
                f"{path}: calibration: {zoo.calibration.uneven}, but recipe {recipe.name!r} is made by an engine "
                f"({recipe.engine}) that takes text in sequences of one length; set sequences to documents or packed, "
                "and name data without images and audio"
            )
    if zoo.calibration is None and any(recipe.calibrated for recipe in zoo.resolved_recipes):
        return check({**raw, "calibration": shipped.DEFAULT_SET}, path)
    return zoo


def _kind(raw: object) -> str:
    """What a YAML document holds instead of a mapping, in YAML's words."""
    return {type(None): "nothing", list: "a list", str: "a text"}.get(type(raw), f"{raw!r}")


def _gates(zoo: Zoo) -> Iterator[tuple[str, Gates]]:
    if not isinstance(zoo.verify.gates, str):
        yield "verify.gates", zoo.verify.gates
    for model in zoo.models:
        yield f"gates of {model.id!r}", model.gates


def read_yaml(path: Path) -> object:
    """The content of a YAML file that the user wrote.

    Raises:
        ZooError: no such file, not readable, or beyond the limits of size, depth and aliases.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(ZOO_BYTES + 1)
        if len(content) > ZOO_BYTES:
            raise ZooError(f"{path}: larger than {ZOO_BYTES} bytes; split the zoo")
        return parse(content.decode(), str(path))
    except FileNotFoundError:
        raise ZooError(f"zoo file: no such file, got {str(path)!r}; `quantmill init` writes a first one") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ZooError(f"{path}: not a readable YAML file: {error}") from error


def parse(text: str, path: str) -> object:
    """The content of a YAML text; ``path`` begins messages.

    Raises:
        ZooError: not readable, or beyond the limits of depth and aliases.
    """
    try:
        return parse_yaml(text)
    except BadYaml as error:
        raise ZooError(f"{path}: {error}") from error
