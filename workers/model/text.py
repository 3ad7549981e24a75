"""Turns rows of text, chat messages or token ids into token sequences of equal length, to calibrate on and to compare.

Rows are typed here, where they come in: what is neither is refused, never printed into the stream.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from workers.errors import CalibrationError, QuantmillError, UnsupportedModel
from workers.spec.bounds import brief, printable
from workers.spec.job import LEAST_TOKENS, Calibration, Dataset, ModelPin, Verification
from workers.transfer.hub import hub_errors

# Sequences are drawn from the first POOL times as many: spread over the text without tokenizing the whole corpus.
POOL = 4
ROWS_AT_A_TIME = 256
# Speakers of conversations that name them by `from` and `value`, as ShareGPT does, by their roles.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES |= {"chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool"}
TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES += ("vocab.json", "chat_template.json")


@dataclass(frozen=True)
class Sequences:
    """Token sequences, int64 [N, T], the special tokens that each begins with, and what was left out of the data."""

    tokens_NT: Tensor
    prefix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


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


def calibration_tokens(calibration: Calibration, tokenizer: Any) -> Sequences:
    """Calibration tokens, int64 [samples, sequence_length], sampled by the seed.

    Raises:
        CalibrationError: unreadable data, or fewer sequences than requested.
    """
    samples, length = calibration.samples, calibration.sequence_length
    pool = sequences(calibration.dataset, tokenizer, length, POOL * samples, "calibration.dataset")
    count = len(pool.tokens_NT)
    if count < samples:
        raise CalibrationError(
            f"calibration.samples: got {samples}, but the data set holds {count} sequences of {length} tokens"
            f"{_of_notes(pool)}; {_at_most('samples', count, 1)}shorten sequence_length, or add text"
        )
    chosen = sorted(random.Random(calibration.seed).sample(range(count), samples))
    return Sequences(pool.tokens_NT[chosen], pool.prefix, pool.notes)


def held_out_tokens(verification: Verification, tokenizer: Any) -> Sequences:
    """Held-out tokens from the start of the text, int64 [sequences, sequence_length], at least ``tokens`` in total.

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
    return held_out


def _at_most(setting: str, most: int, least: int) -> str:
    """The remedy of a smaller setting, where one that works is left."""
    return f"set {setting} to at most {most}, " if most >= least else ""


def _of_notes(found: Sequences) -> str:
    return f" ({'; '.join(found.notes)})" if found.notes else ""


def check_ids(tokens: Sequences, rows: int, where: str) -> None:
    """Refuse token ids that the embedding has no row for; ``rows`` is the number of its rows.

    Raises:
        CalibrationError: the largest id isn't below ``rows``.
    """
    largest, least = (int(tokens.tokens_NT.max()), int(tokens.tokens_NT.min())) if tokens.tokens_NT.numel() else (0, 0)
    if largest >= rows or least < 0:
        raise CalibrationError(
            f"{where}: token id {largest if largest >= rows else least}, but the model's embedding has {rows} rows "
            f"(vocab_size {rows}); its tokenizer is another model's, or tokens were added without resizing the model: "
            "take the tokenizer that the model was trained with, or resize its embeddings"
        )


def prefix_of(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer itself begins a text with, as ids; empty if it adds none there."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def sequences(dataset: Dataset, tokenizer: Any, length: int, at_most: int, where: str) -> Sequences:
    """Tokenize the rows as one stream, and cut it: int64 [n <= at_most, length]; a short last piece is dropped.

    Each sequence begins with the tokenizer's special tokens, unless the data set says ``none`` or holds token ids.

    Raises:
        CalibrationError: a column that holds neither text, nor messages, nor the token ids that it's said to hold.
    """
    rows = _Rows(dataset, tokenizer, where)
    tokens: list[int] = []
    # The kind of rows, and with it the prefix, is known with the first of them.
    prefix: tuple[int, ...] = ()
    for piece in rows.tokens():
        tokens += piece
        prefix = prefix_of(tokenizer) if rows.kind != "token_ids" and dataset.special_tokens != "none" else ()
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


Kind = Literal["text", "messages", "token_ids"]


@dataclass
class _Rows:
    """The rows of a data set's column, typed; counts the rows without content, which are skipped."""

    dataset: Dataset
    tokenizer: Any
    where: str
    kind: Kind | None = None
    skipped: int = 0
    seen: int = 0
    _rows: Any = field(default=None, repr=False)

    def tokens(self) -> Iterator[list[int]]:
        """Token ids of chunks of rows: row by row is slow, and all at once needs too much memory."""
        rows = self._rows = _load(self.dataset, self.where)
        if self.dataset.column not in (rows.column_names or []):
            raise CalibrationError(
                f"{self.where}.column: no such column, got {self.dataset.column!r}; the data set has "
                f"{rows.column_names}"
            )
        if self.dataset.holds != "auto":
            self.kind = self.dataset.holds
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            values = [
                value
                for number, value in enumerate(rows[start : start + ROWS_AT_A_TIME][self.dataset.column], start)
                if self._has_content(value, number)
            ]
            if not values:
                continue
            if self.kind == "token_ids":
                yield [id_ for value in values for id_ in value]
                continue
            texts = values if self.kind == "text" else [self._rendered(value) for value in values]
            text = self.dataset.separator.join(texts) + self.dataset.separator
            yield self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def notes(self) -> Iterator[str]:
        """What was left out."""
        if self.skipped:
            yield f"{self.where}: {self.skipped} of {self.seen} rows read are empty, and were skipped"

    def _has_content(self, value: Any, number: int) -> bool:
        """Whether a row has content; check its type against that of the rows before."""
        self.seen += 1
        # An empty line of a text file is part of the text.
        lines = self.dataset.path == "text"
        if value is None or (not lines and isinstance(value, str) and not value.strip()) or value in ([], {}):
            self.skipped += 1
            return False
        kind = _kind(value)
        if self.kind is None and kind in ("text", "messages"):
            self.kind = kind
        if kind is None or kind != self.kind:
            raise self._refused(value, number, kind)
        return True

    def _refused(self, value: Any, number: int, kind: Kind | None) -> CalibrationError:
        column = f"{self.where}.column {self.dataset.column!r}"
        type_ = printable(str(self._rows.features[self.dataset.column]))[:120]
        if kind == "token_ids" and self.kind is None:
            remedy = "it holds whole numbers; if these are token ids of this model's tokenizer, set holds: token_ids"
        else:
            remedy = (
                "expected text, chat messages ([{role, content}, ...] or [{from, value}, ...]), or lists of token ids "
                "with holds: token_ids; name another column"
            )
        return CalibrationError(
            f"{column}: row {number} is of the type {type_}, got {printable(repr(value))[:80]}"
            f"{f', after rows of {self.kind}' if self.kind and kind else ''}: {remedy}"
        )

    def _rendered(self, messages: list[Mapping[str, Any]]) -> str:
        """A conversation as the model's chat template renders it."""
        column = f"{self.where}.column {self.dataset.column!r}"
        if not getattr(self.tokenizer, "chat_template", None):
            type_ = printable(str(self._rows.features[self.dataset.column]))[:120]
            raise CalibrationError(
                f"{column} holds chat messages ({type_}), but the model's tokenizer has no chat template; expected a "
                "column of text, or a model with a chat template"
            )
        try:
            return str(self.tokenizer.apply_chat_template(list(_turns(messages, column)), tokenize=False))
        except QuantmillError:
            raise
        except Exception as error:  # templates raise jinja's errors, and their own
            raise CalibrationError(
                f"{column}: the model's chat template doesn't take {printable(repr(messages))[:80]} ({brief(error)}); "
                "name data that it takes"
            ) from error


def _kind(value: Any) -> Kind | None:
    """What a row holds; None: nothing that sequences can be made of."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if all(
        isinstance(item, dict) and ({"role", "content"} <= set(item) or {"from", "value"} <= set(item))
        for item in value
    ):
        return "messages"
    if all(type(item) is int and item >= 0 for item in value):
        return "token_ids"
    return None


def _turns(messages: Iterable[Mapping[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """Messages with roles and text, without the keys that are null: data sets give all rows the same keys."""
    for message in messages:
        named = {key: value for key, value in message.items() if value is not None}
        if "role" not in named and "from" in named:
            role = ROLES.get(str(named.pop("from")))
            if role is None:
                raise CalibrationError(
                    f"{column}: from: got {printable(repr(message['from']))[:40]}, expected one of {', '.join(ROLES)}"
                )
            named |= {"role": role, "content": named.pop("value", "")}
        content = named.get("content", "")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str) or not isinstance(named.get("role"), str):
            raise CalibrationError(
                f"{column}: expected messages with a role and text, got {printable(repr(message))[:80]}; name another "
                "column"
            )
        yield {**named, "content": content}


def _load(dataset: Dataset, where: str) -> Any:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    disable_progress_bars()

    def load() -> Any:
        return load_dataset(
            dataset.path,
            dataset.name,
            data_files=list(dataset.data_files) or None,
            split=dataset.split,
            revision=dataset.revision,
        )

    try:
        try:
            return load()
        except DatasetNotFoundError:
            # A private one: this stage has no token, but an earlier one has fetched it.
            rows = _from_cache(load) if dataset.revision else None
            if rows is None or not _is_of(rows, str(dataset.revision)):
                raise
            return rows
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise CalibrationError(f"{where}: datasets can't read it, got {dataset.path!r} ({error})") from error


def _from_cache(load: Callable[[], Any]) -> Any:
    """What ``load`` finds without the Hub."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return load()
    finally:
        config.HF_HUB_OFFLINE = before


def _is_of(rows: Any, revision: str) -> bool:
    """Whether rows from the cache are of that commit: without the Hub, the library takes the newest that it has."""
    return bool(rows.cache_files) and all(revision in Path(file["filename"]).parts for file in rows.cache_files)


def fetch_dataset(dataset: Dataset, where: str) -> None:
    """Download a data set into the client's cache, from where later stages read it.

    Raises:
        CalibrationError: the data set can't be read.
        HubUnavailable, DiskFull: see ``hub.hub_errors``.
    """
    with hub_errors(f"{where}: {dataset.path}"):
        _load(dataset, where)
