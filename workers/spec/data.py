"""The text (and pictures) that a model is calibrated on and compared on: data sets, mixtures of them, and how they
are cut into sequences.

No torch, no ray: the driver imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from workers.spec.base import Frozen

SpecialTokens = Literal["auto", "none"]


class Turns(Frozen):
    """Columns of a data set whose rows are one exchange each: an instruction and its answer."""

    user: str = Field(description="Column of the question or instruction.")
    assistant: str = Field(description="Column of the answer.")
    system: str | None = Field(None, description="Column of the system prompt; rows without one have none.")

    @property
    def ordered(self) -> tuple[str | None, str, str]:
        """The columns in the order of a conversation: system prompt, instruction, answer."""
        return self.system, self.user, self.assistant

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are named, in that order."""
        return tuple(name for name in self.ordered if name)


class Dataset(Frozen):
    """Text, as ``datasets.load_dataset`` reads it."""

    path: str = Field(description="A builder (text, json, parquet, ...) or a Hub data set.")
    name: str | None = Field(None, description="Configuration of a Hub data set, as wikitext-2-raw-v1.")
    data_files: tuple[str, ...] = Field((), description="Files, relative to the zoo file.")
    split: str = Field("train", description="Part of the data set; local files are all in train.")
    column: str = Field("text", description="The column that is read.")
    revision: str | None = Field(None, description="Of a Hub data set: branch, tag or commit; null: the newest.")
    separator: str = Field("\n", description="Put between two rows when they are joined into one stream of tokens.")
    holds: Literal["auto", "text", "messages", "token_ids"] = Field(
        "auto",
        description="What the column holds: text, chat messages (role and content, or from and value; rendered by the "
        "model's chat template), or lists of token ids, which are taken as they are only if that is said here.",
    )
    special_tokens: SpecialTokens | None = Field(
        None, description="Whether sequences begin as the tokenizer begins a text (auto); left out: as the zoo says."
    )
    turns: Turns | None = Field(
        None, description="Columns of an instruction and its answer, read as a conversation instead of column."
    )
    without_template: Literal["refuse", "plain"] = Field(
        "refuse",
        description="What becomes of conversations where the tokenizer has no chat template: an error, or (plain) "
        "their texts, one after the other.",
    )
    images: str | None = Field(
        None,
        description="Column of a row's pictures, one or a list, for models that take them: each row is then a sequence "
        "of its own, prepared by the model's processor.",
    )
    audio: str | None = Field(
        None, description="Column of a row's sounds: of the type Audio, or samples (array, sampling_rate)."
    )
    share: float = Field(1.0, gt=0, description="Of a mixture's sequences, in proportion to the others' shares.")

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what earlier releases didn't know, where it isn't set: manifests and identities keep their bytes."""
        return without_defaults(self, serialize(self), ("turns", "without_template", "images", "audio", "share"))

    @property
    def shows(self) -> str:
        """The keys of columns that only a processor prepares; empty for text."""
        return " and ".join(key for key in ("images", "audio") if getattr(self, key))

    @property
    def public(self) -> Dataset:
        """The same data set without this machine's paths: files by their names."""
        names = tuple(Path(name).name for name in self.data_files)
        path = Path(self.path).name if Path(self.path).is_absolute() else self.path
        return self.model_copy(update={"data_files": names, "path": path})

    @property
    def called(self) -> str:
        """What it is called in a line of text: the names of its files, or its own with its configuration."""
        names = [Path(name).name for name in self.data_files]
        return ", ".join(names) or " ".join(filter(None, (self.public.path, self.name)))


def without_defaults(value: Frozen, content: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A value's serialized content, less those of the named fields that hold their default."""
    fields = type(value).model_fields
    return {
        key: inner for key, inner in content.items() if key not in names or getattr(value, key) != fields[key].default
    }


Sequences = Literal["packed", "documents", "single"]


class Calibration(Frozen):
    """The text and settings of calibration."""

    dataset: Dataset | None = Field(
        None, description="The text; in place of it, mixture has several, or set names some."
    )
    mixture: tuple[Dataset, ...] = Field(
        (), description="Several data sets; each gives its share of the sequences, in this order."
    )
    set: str | None = Field(
        None, description="Name of a set of configs/calibration, which fills in what isn't given here."
    )
    samples: int = Field(512, ge=1, description="Sequences; they are drawn from four times as many.")
    sequence_length: int = Field(
        2048, ge=8, description="Tokens of a sequence; left out: 2048, or the model's positions where these are fewer."
    )
    sequences: Sequences = Field(
        "packed",
        description="How text is cut: packed (joined, and cut anywhere), documents (each sequence begins with a row's "
        "beginning and is filled with further rows), or single (one row to a sequence; what is longer is cut).",
    )
    seed: int = Field(0, description="Of the draw; another one makes other artifacts.")
    experts: Literal["routed", "all"] = Field(
        "routed", description="routed: an expert learns from the tokens sent to it; all: from every token of its layer."
    )
    minimum_expert_tokens: int = Field(
        128, ge=0, description="An expert with fewer tokens learns from those of all experts of its layer together."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (not self.mixture):
            raise ValueError(
                f"expected one of dataset, mixture and set, got {'both' if self.dataset else 'none'}; give the text as "
                "dataset: {path: ...}, several as mixture: [{path: ..., share: 2}, ...], or name a set as set: general"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what earlier releases didn't know, where it isn't set."""
        return without_defaults(self, serialize(self), ("dataset", "mixture", "set", "sequences"))

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """The data sets that sequences are drawn from."""
        return self.mixture or ((self.dataset,) if self.dataset else ())

    def within(self, positions: int | None) -> Calibration:
        """The same for a model of that many positions, which bound the length of sequences where none was given."""
        fits = positions is None or self.sequence_length <= positions
        if fits or "sequence_length" in self.model_fields_set:
            return self
        return self.model_copy(update={"sequence_length": positions})

    @property
    def public(self) -> Calibration:
        """The same settings without this machine's paths."""
        return self.with_datasets(tuple(dataset.public for dataset in self.datasets))

    def with_datasets(self, datasets: tuple[Dataset, ...]) -> Calibration:
        """The same settings with as many other data sets."""
        only = {"dataset": datasets[0]} if self.dataset is not None else {"mixture": datasets}
        return self.model_copy(update=only)

    def where(self, index: int) -> str:
        """The key of a data set in a zoo file, as messages name it."""
        return "calibration.dataset" if self.dataset is not None else f"calibration.mixture.{index}"

    @property
    def uneven(self) -> str:
        """Why its sequences aren't tokens of one length; empty if they are."""
        shows = next((dataset.shows for dataset in self.datasets if dataset.shows), "")
        return f"got {shows}" if shows else "got sequences: single" if self.sequences == "single" else ""

    @property
    def described(self) -> str:
        """What is calibrated on: how many sequences and tokens, of which data sets."""
        each = f"{self.sequence_length} tokens"
        how = {
            "packed": f"{self.samples} sequences of {each}",
            "documents": f"{self.samples} sequences of {each} that begin with a row",
            "single": f"{self.samples} rows, each a sequence of at most {each}",
        }[self.sequences]
        named = f"set {self.set}: " if self.set else ""
        if len(self.datasets) == 1:
            return f"{named}{how} of {self.datasets[0].called}"
        tokens = "" if self.sequences == "single" else " ({:,} tokens)"
        of = (
            f"{count}{tokens.format(count * self.sequence_length)} of {dataset.called}"
            for dataset, count in zip(self.datasets, self.counts, strict=True)
        )
        return f"{named}{how}: {', '.join(of)}"

    @property
    def counts(self) -> tuple[int, ...]:
        """Sequences that each data set gives: in proportion to the shares, the largest remainders rounded up."""
        shares = [dataset.share for dataset in self.datasets]
        exact = [self.samples * share / sum(shares) for share in shares]
        counts = [int(count) for count in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
        for index in by_remainder[: self.samples - sum(counts)]:
            counts[index] += 1
        return tuple(counts)


# Fewest held-out tokens that a comparison takes.
LEAST_TOKENS = 256


class Verification(Frozen):
    """The held-out text, and the number of tokens to evaluate."""

    dataset: Dataset
    data: str = Field("", description="What stands for the text's content: sha256, set by the plan.")
    tokens: int = Field(16384, ge=LEAST_TOKENS)
    sequence_length: int = Field(512, ge=8)
    shown: Dataset | None = Field(None, description="Rows with pictures or sounds, beside the text.")
    shown_data: str = Field("", description="What stands for their content: sha256, set by the plan.")
    rows: int = Field(16, ge=2, description="Of them.")
    continuations: bool = Field(True, description="Whether card and report show how prompts of the text go on.")

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what earlier releases didn't know, where it isn't set."""
        return without_defaults(self, serialize(self), ("shown", "shown_data", "rows", "continuations"))

    @property
    def public(self) -> Verification:
        """The same settings without this machine's paths."""
        return self.model_copy(
            update={"dataset": self.dataset.public, "shown": self.shown.public if self.shown else None}
        )

    @property
    def of_text(self) -> Verification:
        """The same for a model that takes text alone."""
        return self.model_copy(update={"shown": None, "shown_data": ""})

    def same_as(self, other: Verification) -> bool:
        """Whether both evaluate the same tokens."""
        mine, theirs = (
            (v.data, v.tokens, v.sequence_length, v.dataset.holds, v.dataset.special_tokens, v.shown_data, v.rows)
            for v in (self, other)
        )
        return mine == theirs
