"""Cuts the rows of data sets into token sequences, to calibrate on and to compare."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from workers.errors import CalibrationError, QuantmillError, UnsupportedModel
from workers.model.pictures import Inputs, Pictures
from workers.model.reference import micro_batches
from workers.model.rows import Rows
from workers.spec.bounds import brief
from workers.spec.data import LEAST_TOKENS, Calibration, Dataset, Verification
from workers.spec.job import ModelPin
from workers.spec.workspace import MICRO_BATCH_TOKENS

# Sequences are drawn from the first POOL times as many: spread over the text without tokenizing the whole corpus.
POOL = 4
Drawn = TypeVar("Drawn")
# The most tokens of a held-out row with its pictures.
SHOWN_TOKENS = 8192
# A row of fewer tokens makes no sequence of its own.
LEAST_ROW = 8
TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES += ("vocab.json", "chat_template.json")


@dataclass(frozen=True)
class Sequences:
    """Token sequences, int64 [N, T], the special tokens that each begins with, and what was left out of the data.

    ``shown``: sequences with pictures or sounds, as the processor prepared them.
    """

    tokens_NT: Tensor
    prefix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    shown: tuple[Inputs, ...] = ()

    @property
    def rows(self) -> list[Tensor]:
        """The token ids of each sequence, int64 [T], those with pictures or sounds last."""
        return [*self.tokens_NT, *(inputs["input_ids"][0] for inputs in self.shown)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a model is given."""
        return [self.tokens_NT, *(tensor for inputs in self.shown for tensor in inputs.values())]

    def batches(self, tokens: int = MICRO_BATCH_TOKENS) -> list[Tensor | Inputs]:
        """Micro-batches of at most that many tokens, or of one sequence."""
        return [*micro_batches(self.tokens_NT, tokens), *self.shown]


def load_tokenizer(folder: Path, pin: ModelPin) -> Any:
    """Load the model's own tokenizer.

    Raises:
        UnsupportedModel: transformers can't load one; the message names the file that is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=pin.trust_remote_code)
    except QuantmillError:
        raise
    except Exception as error:  # tokenizers and remote code raise whatever they like
        broken = _broken_file(folder)
        what = (
            f"{broken[0]} can't be read ({broken[1]})"
            if broken
            else f"no tokenizer that transformers loads ({brief(error)})"
        )
        raise UnsupportedModel(
            f"models: {pin.id!r}: {what}; replace its tokenizer's files by those of the original model"
        ) from error


def has_chat_template(folder: Path) -> bool:
    """Whether a model's tokenizer has a chat template, in a file of its own or in its settings."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _broken_file(folder: Path) -> tuple[str, str] | None:
    """The first file of a tokenizer that isn't what it should be, and why."""
    from tokenizers import Tokenizer

    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
            if name == "tokenizer.json":
                Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            return name, brief(error)
    return None


@dataclass(frozen=True)
class CalibrationTokens:
    """What a model is calibrated on: sequences in groups of one length each, int64 [N, T], the longest first."""

    groups: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()
    shown: tuple[Inputs, ...] = ()


def calibration_tokens(calibration: Calibration, tokenizer: Any, processor: Any = None) -> CalibrationTokens:
    """The sequences of a calibration: from each data set its share, drawn by the seed.

    ``processor`` prepares those with pictures or sounds, which come last, each alone.

    Raises:
        CalibrationError: unreadable data, or fewer sequences than requested.
    """
    drawn, shown, notes = list[Tensor](), list[Inputs](), list[str]()
    for index, (dataset, count) in enumerate(zip(calibration.datasets, calibration.counts, strict=True)):
        where = calibration.where(index)
        if dataset.shows:
            pictures = Pictures(dataset, processor, where)
            pool = pictures.sequences(calibration.sequence_length, POOL * count)
            said = tuple(pictures.notes(calibration.sequence_length))
            shown += _chosen(pool, calibration, count, where, said, "rows with pictures or sounds of at most")
        else:
            sequences, said = _drawn(calibration, dataset, count, tokenizer, where)
            drawn += sequences
        notes += said
    return CalibrationTokens(_by_length(drawn), tuple(notes), tuple(shown))


def _drawn(
    calibration: Calibration, dataset: Dataset, samples: int, tokenizer: Any, where: str
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Sequences of one data set, int64 [T] each, and what was left out of it."""
    length = calibration.sequence_length
    if calibration.sequences == "packed":
        found = sequences(dataset, tokenizer, length, POOL * samples, where)
        pool, notes = list(found.tokens_NT), found.notes
    else:
        rows = Rows(dataset, tokenizer, where)
        cut = _single if calibration.sequences == "single" else _whole_rows
        pool = [torch.tensor(tokens) for tokens in islice(cut(rows, length), POOL * samples)]
        notes = tuple(rows.notes())
    kind = "rows of at least 8 tokens, cut to" if calibration.sequences == "single" else "sequences of"
    return _chosen(pool, calibration, samples, where, notes, kind), notes


def _chosen(
    pool: list[Drawn], calibration: Calibration, samples: int, where: str, notes: tuple[str, ...], kind: str
) -> list[Drawn]:
    """As many of the pool, drawn by the seed, in their order.

    Raises:
        CalibrationError: the pool is too small.
    """
    if len(pool) < samples:
        of = f" of {where}" if len(calibration.datasets) > 1 else ""
        said = f" ({'; '.join(notes)})" if notes else ""
        shown = kind.startswith("rows with")
        remedy = "raise sequence_length, or add rows" if shown else "shorten sequence_length, or add text"
        raise CalibrationError(
            f"calibration.samples: got {samples}{of}, but the data set holds {len(pool)} {kind} "
            f"{calibration.sequence_length} tokens{said}; {_at_most('samples', len(pool), 1)}{remedy}"
        )
    chosen = sorted(random.Random(calibration.seed).sample(range(len(pool)), samples))
    return [pool[index] for index in chosen]


def _whole_rows(rows: Rows, length: int) -> Iterator[list[int]]:
    """Sequences of that many tokens: each begins with a row's beginning, and holds rows until it is full."""
    sequence: list[int] = []
    separator = rows.tokens_of(rows.dataset.separator)
    for row in rows.each():
        if sequence:
            sequence += row if rows.kind == "token_ids" else [*separator, *row]
        else:
            sequence = rows.begun(row)
        if len(sequence) >= length:
            yield sequence[:length]
            sequence = []


def _single(rows: Rows, length: int) -> Iterator[list[int]]:
    """One sequence for each row of enough tokens, cut to at most ``length``."""
    for row in rows.each():
        if len(row) >= LEAST_ROW:
            yield rows.begun(row)[:length]


def _by_length(sequences: list[Tensor]) -> tuple[Tensor, ...]:
    """Sequences int64 [T] stacked by length, the longest first; those of one length stay in their order."""
    lengths = sorted({len(sequence) for sequence in sequences}, reverse=True)
    return tuple(torch.stack([s for s in sequences if len(s) == length]) for length in lengths)


def held_out_tokens(verification: Verification, tokenizer: Any, processor: Any = None) -> Sequences:
    """Held-out tokens from the start of the text, int64 [sequences, sequence_length], at least ``tokens`` in total.

    ``processor`` prepares rows with pictures or sounds, where the verification names some.

    Raises:
        CalibrationError: unreadable data, or fewer tokens than requested.
    """
    length = verification.sequence_length
    wanted = -(-verification.tokens // length)
    held_out = sequences(verification.dataset, tokenizer, length, wanted, "verify.dataset")
    count = len(held_out.tokens_NT)
    if count < wanted:
        raise CalibrationError(
            f"verify.tokens: got {verification.tokens}, but the data set holds {count * length} in sequences "
            f"of {length}{_of_notes(held_out)}; {_at_most('tokens', count * length, max(2 * length, LEAST_TOKENS))}"
            f"{'shorten sequence_length, ' if count < 2 else ''}or add text"
        )
    if verification.shown is None:
        return held_out
    pictures = Pictures(verification.shown, processor, "verify.shown")
    shown = pictures.sequences(SHOWN_TOKENS, verification.rows)
    if len(shown) < verification.rows:
        raise CalibrationError(
            f"verify.rows: got {verification.rows}, but the data set holds {len(shown)} of at most {SHOWN_TOKENS} "
            "tokens; lower it, or add rows"
        )
    return replace(held_out, shown=tuple(shown), notes=(*held_out.notes, *pictures.notes(SHOWN_TOKENS)))


def _at_most(setting: str, most: int, least: int) -> str:
    """The remedy of a smaller setting, where one that works is left."""
    return f"set {setting} to at most {most}, " if most >= least else ""


def _of_notes(found: Sequences) -> str:
    return f" ({'; '.join(found.notes)})" if found.notes else ""


def check_ids(groups: Iterable[Tensor], rows: int, where: str) -> None:
    """Refuse token ids that the embedding has no row for; ``rows`` is the number of its rows.

    Raises:
        CalibrationError: the largest id isn't below ``rows``.
    """
    ids = [id_ for group in groups if group.numel() for id_ in (int(group.max()), int(group.min()))]
    if bad := [id_ for id_ in ids if not 0 <= id_ < rows]:
        raise CalibrationError(
            f"{where}: token id {bad[0]}, but the model's embedding has {rows} rows "
            f"(vocab_size {rows}); its tokenizer is another model's, or tokens were added without resizing the model: "
            "take the tokenizer that the model was trained with, or resize its embeddings"
        )


def sequences(dataset: Dataset, tokenizer: Any, length: int, at_most: int, where: str) -> Sequences:
    """Tokenize the rows as one stream, and cut it: int64 [n <= at_most, length]; a short last piece is dropped.

    Each sequence begins with the tokenizer's special tokens, unless the data set says ``none`` or holds token ids.

    Raises:
        CalibrationError: a column that holds neither text, nor messages, nor the token ids that it's said to hold.
    """
    rows = Rows(dataset, tokenizer, where)
    tokens: list[int] = []
    # The kind of rows, and with it the prefix, is known with the first of them.
    prefix: tuple[int, ...] = ()
    for piece in rows.joined():
        tokens += piece
        prefix = rows.prefix
        if len(prefix) >= length:
            raise CalibrationError(
                f"{where}: sequence_length: got {length}, and the tokenizer begins each sequence with {len(prefix)} "
                "special tokens; raise it, or set special_tokens: none"
            )
        if len(tokens) >= at_most * (length - len(prefix)):
            break
    body = length - len(prefix)
    count = min(len(tokens) // body, at_most)
    cut = torch.tensor(tokens[: count * body], dtype=torch.int64).view(count, body)
    begun = torch.tensor(prefix, dtype=torch.int64).expand(count, len(prefix))
    return Sequences(torch.cat([begun, cut], dim=1), prefix, tuple(rows.notes()))
