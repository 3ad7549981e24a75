"""Reads the rows of a data set's column, and gives their token ids: text, chat messages, exchanges, or token ids.

Rows are typed here, where they come in: what is neither is refused, never printed into the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workers.errors import CalibrationError, QuantmillError
from workers.spec.bounds import brief, printable
from workers.spec.data import Dataset
from workers.transfer.hub import hub_errors

ROWS_AT_A_TIME = 256
# Speakers of conversations that name them by `from` and `value`, as ShareGPT does, by their roles.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES |= {"chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool"}


def prefix_of(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer itself begins a text with, as ids; empty if it adds none there."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


Kind = Literal["text", "messages", "token_ids"]


@dataclass
class Rows:
    """The rows of a data set's column, typed; counts the rows without content, which are skipped.

    ``where`` is the data set's key in a zoo file, as messages name it.
    """

    dataset: Dataset
    tokenizer: Any
    where: str
    kind: Kind | None = None
    skipped: int = 0
    seen: int = 0
    _rows: Any = field(default=None, repr=False)

    def joined(self) -> Iterator[list[int]]:
        """Token ids of chunks of joined rows: row by row is slow, and all at once needs too much memory."""
        for values in self._chunks():
            if self.kind == "token_ids":
                yield [id_ for value in values for id_ in value]
            else:
                texts = values if self.kind == "text" else [self._rendered(value) for value in values]
                text = self.dataset.separator.join(texts) + self.dataset.separator
                yield self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def each(self) -> Iterator[list[int]]:
        """Token ids of one row after the other."""
        for values in self._chunks():
            if self.kind == "token_ids":
                yield from values
            else:
                texts = values if self.kind == "text" else [self._rendered(value) for value in values]
                yield from self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _chunks(self) -> Iterator[list[Any]]:
        """Rows with content, in the order of the data set."""
        rows = self._rows = load(self.dataset, self.where)
        columns = self.dataset.turns.columns if self.dataset.turns else (self.dataset.column,)
        if lacking := [name for name in columns if name not in (rows.column_names or [])]:
            key = "turns" if self.dataset.turns else "column"
            raise CalibrationError(
                f"{self.where}.{key}: no such column, got {lacking[0]!r}; the data set has {rows.column_names}"
            )
        if self.dataset.holds != "auto":
            self.kind = self.dataset.holds
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            chunk = rows[start : start + ROWS_AT_A_TIME]
            values = [
                value for number, value in enumerate(self._values(chunk), start) if self._has_content(value, number)
            ]
            if values:
                yield values

    def _values(self, chunk: Mapping[str, list[Any]]) -> list[Any]:
        """The column's values; those of several columns as conversations, and None where one lacks its turn."""
        turns = self.dataset.turns
        if turns is None:
            return chunk[self.dataset.column]
        systems = chunk[turns.system] if turns.system else [None] * len(chunk[turns.user])
        return [
            exchange(system, user, assistant)
            for system, user, assistant in zip(systems, chunk[turns.user], chunk[turns.assistant], strict=True)
        ]

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that a sequence of these rows begins with; known once a row has been read."""
        if self.kind == "token_ids" or self.dataset.special_tokens == "none":
            return ()
        return prefix_of(self.tokenizer)

    def begun(self, row: list[int]) -> list[int]:
        """A row's tokens as the beginning of a sequence: a chat template may write the special tokens itself."""
        prefix = list(self.prefix)
        return row if row[: len(prefix)] == prefix else [*prefix, *row]

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

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
        column, type_ = self._column()
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
        column, type_ = self._column()
        turns = list(chat_turns(messages, column))
        if not getattr(self.tokenizer, "chat_template", None):
            if self.dataset.without_template == "plain":
                return "\n\n".join(turn["content"] for turn in turns) + "\n"
            raise CalibrationError(
                f"{column} holds chat messages ({type_}), but the model's tokenizer has no chat template; expected a "
                "column of text, a model with a chat template, or without_template: plain"
            )
        # What ends with the user's turn is a question: the model answers it after its generation prompt.
        asks = bool(turns) and turns[-1]["role"] != "assistant"
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))
        except QuantmillError:
            raise
        except Exception as error:  # templates raise jinja's errors, and their own
            raise CalibrationError(
                f"{column}: the model's chat template doesn't take {printable(repr(messages))[:80]} ({brief(error)}); "
                "name data that it takes"
            ) from error

    def _column(self) -> tuple[str, str]:
        """The column as messages name it, and its type."""
        turns = self.dataset.turns
        if turns is not None:
            return f"{self.where}.turns {', '.join(turns.columns)}", "an exchange"
        name = self.dataset.column
        return f"{self.where}.column {name!r}", printable(str(self._rows.features[name]))[:120]


def exchange(system: Any, user: Any, assistant: Any) -> list[dict[str, Any]] | None:
    """One exchange as chat messages; None if the instruction or the answer is empty."""
    said = [("system", system), ("user", user), ("assistant", assistant)]
    turns = [{"role": role, "content": content} for role, content in said if content not in (None, "")]
    return turns if [turn["role"] for turn in turns][-2:] == ["user", "assistant"] else None


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


def chat_turns(
    messages: Iterable[Mapping[str, Any]], column: str, *, pictures: bool = False
) -> Iterator[dict[str, Any]]:
    """Messages with roles and text, without the keys that are null: data sets give all rows the same keys.

    With ``pictures``, content may be a list of parts: text, and places of pictures or sounds.
    """
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
        parts = content if isinstance(content, list) and all(isinstance(part, dict) for part in content) else []
        kinds = {part.get("type") for part in parts}
        if parts and kinds == {"text"}:
            content = "".join(str(part.get("text") or "") for part in parts)
        shown = pictures and bool(parts) and kinds <= {"text", "image", "audio"}
        if shown:
            content = [{key: value for key, value in part.items() if value is not None} for part in parts]
        if not (isinstance(content, str) or shown) or not isinstance(named.get("role"), str):
            raise CalibrationError(
                f"{column}: expected messages with a role and text, got {printable(repr(message))[:80]}; name another "
                "column"
            )
        yield {**named, "content": content}


def load(dataset: Dataset, where: str) -> Any:
    """The rows of a data set.

    Raises:
        CalibrationError: datasets can't read it.
    """
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    disable_progress_bars()

    def read() -> Any:
        return load_dataset(
            dataset.path,
            dataset.name,
            data_files=list(dataset.data_files) or None,
            split=dataset.split,
            revision=dataset.revision,
        )

    try:
        try:
            return read()
        except DatasetNotFoundError:
            # A private one: this stage has no token, but an earlier one has fetched it.
            rows = _from_cache(read) if dataset.revision else None
            if rows is None or not _is_of(rows, str(dataset.revision)):
                raise
            return rows
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise CalibrationError(f"{where}: datasets can't read it, got {dataset.path!r} ({error})") from error


def _from_cache(read: Callable[[], Any]) -> Any:
    """What ``read`` finds without the Hub."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return read()
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
        load(dataset, where)
