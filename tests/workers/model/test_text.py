"""Data sets by their rows' types: what becomes tokens, what is skipped and counted, what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from workers.errors import CalibrationError, QuantmillError, UnsupportedModel
from workers.model import rows as reading
from workers.model import text
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.job import ModelPin

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def bytes_tokenizer(*, bos: bool = False, template: str | None = None) -> Any:
    """A tokenizer of bytes; with ``bos`` it begins each text with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def rows(monkeypatch: pytest.MonkeyPatch, column: list[Any]) -> None:
    """Let every data set be these rows, as ``datasets`` types them."""
    from datasets import Dataset as Rows

    monkeypatch.setattr(reading, "load", lambda dataset, where: Rows.from_dict({"text": column}))


def read(tokenizer: Any, length: int = 8, at_most: int = 10_000, **said: Any) -> text.Sequences:
    return text.sequences(Dataset(path="json", **said), tokenizer, length, at_most, "calibration.dataset")


def said(tokenizer: Any, found: text.Sequences) -> str:
    return str(tokenizer.decode(found.tokens_NT[:, len(found.prefix) :].flatten().tolist()))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([None, "", "  \n", "a line", "another one"]), min_size=1, max_size=700))
def test_rows_without_text_are_skipped_and_counted(column: list[str | None]) -> None:
    full = [row for row in column if row and row.strip()]
    with pytest.MonkeyPatch.context() as patch:
        rows(patch, column)
        found = read(bytes_tokenizer(), length=8)
    expected = "".join(row + "\n" for row in full)
    assert said(bytes_tokenizer(), found) == expected[: len(expected) // 8 * 8]
    empty = len(column) - len(full)
    wanted = [f"calibration.dataset: {empty} of {len(column)} rows read are empty, and were skipped"] if empty else []
    assert list(found.notes) == wanted


def test_empty_lines_of_a_text_file_belong_to_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo\n" * 8)
    dataset = Dataset(path="text", data_files=(str(tmp_path / "text.txt"),))
    found = text.sequences(dataset, bytes_tokenizer(), 9, 100, "verify.dataset")
    assert said(bytes_tokenizer(), found) == "one\n\ntwo\n" * 8
    assert found.notes == ()


@pytest.mark.parametrize("bos", [True, False])
def test_sequences_begin_as_the_tokenizer_begins_a_text(bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, ["abcdefg"] * 10)
    found = read(bytes_tokenizer(bos=bos), length=8)
    assert found.tokens_NT.shape[1] == 8
    assert found.prefix == ((256,) if bos else ())
    assert bool((found.tokens_NT[:, 0] == 256).all()) is bos
    assert int((found.tokens_NT == 256).sum()) == (len(found.tokens_NT) if bos else 0)
    without = read(bytes_tokenizer(bos=bos), length=8, special_tokens="none")
    assert int((without.tokens_NT == 256).sum()) == 0
    # The same text, only cut in other places.
    assert said(bytes_tokenizer(), found).startswith(said(bytes_tokenizer(), without)[:40])


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Ho", "name": None}],
    ],
)
def test_chat_messages_go_through_the_chat_template(
    conversation: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(monkeypatch, [conversation] * 20)
    tokenizer = bytes_tokenizer(template=TEMPLATE)
    found = read(tokenizer, length=10)
    assert said(tokenizer, found).startswith("<s><user>Hi\n<assistant>Ho\n\n<s><user>")
    assert "role" not in said(tokenizer, found)


def test_chat_messages_without_a_template_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, [[{"role": "user", "content": "Hi"}]])
    with pytest.raises(
        CalibrationError, match=r"'text' holds chat messages .*no chat template; expected a column of text"
    ):
        read(bytes_tokenizer())


def test_a_template_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, [[{"role": "user", "content": "Hi"}]])
    with pytest.raises(CalibrationError, match="roles must alternate"):
        read(bytes_tokenizer(template="{{ raise_exception('roles must alternate') }}"))


def test_token_ids_are_taken_as_ids_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, [[1, 2, 3], None, [], [4, 5, 6, 7, 8]])
    found = read(bytes_tokenizer(bos=True), length=8, holds="token_ids")
    assert torch.equal(found.tokens_NT, torch.arange(1, 9)[None])
    assert found.notes == ("calibration.dataset: 2 of 4 rows read are empty, and were skipped",)
    with pytest.raises(CalibrationError, match="set holds: token_ids"):
        read(bytes_tokenizer(), length=8)


VALUES = st.one_of(
    st.integers(-(2**31), 2**31), st.floats(), st.booleans(), st.binary(max_size=4), st.lists(st.floats(), min_size=1),
    st.dictionaries(st.sampled_from(["role", "x"]), st.text(max_size=3), min_size=1),
    st.lists(st.dictionaries(st.just("x"), st.text(max_size=3), min_size=1), min_size=1, max_size=2),
    st.lists(st.text(max_size=3), min_size=1, max_size=3), st.lists(st.integers(-9, -1), min_size=1),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(VALUES, st.sampled_from(["auto", "text", "messages", "token_ids"]))
def test_anything_else_is_refused_with_the_columns_type(value: Any, holds: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        rows(patch, [value] * 3)
        with pytest.raises(
            CalibrationError, match=r"calibration\.dataset\.column 'text': row 0 is of the type .*, got .*; "
        ):
            read(bytes_tokenizer(template=TEMPLATE), holds=holds)


def test_one_odd_row_is_named() -> None:
    # Tables have one type for a column; data sets that hold JSON don't.
    found = reading.Rows(Dataset(path="json"), bytes_tokenizer(), "verify.dataset")
    found._rows = SimpleNamespace(features={"text": "Json()"})
    assert found._has_content("a line", 0)
    with pytest.raises(CalibrationError, match=r"row 7 is of the type Json\(\), got \[1, 2\], after rows of text"):
        found._has_content([1, 2], 7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 300))
def test_ids_beyond_the_embedding_are_refused_with_both_numbers(largest: int, count: int) -> None:
    found = text.Sequences(torch.tensor([[0, largest]]))
    if largest < count:
        text.check_ids((found.tokens_NT,), count, "verify.dataset")
        return
    with pytest.raises(CalibrationError, match=f"token id {largest}, .* {count} rows"):
        text.check_ids((found.tokens_NT,), count, "verify.dataset")


@pytest.mark.parametrize("content", ["{", '{"model": {"type": "Nothing"}}', "[]", '{"version": "1.0"}', "\ufeff{}"])
def test_a_broken_tokenizer_is_named_with_its_file(content: str, tmp_path: Path) -> None:
    bytes_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    pin = ModelPin(id="acme/model", revision="0" * 40)
    assert text.load_tokenizer(tmp_path, pin) is not None
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"'acme/model': tokenizer\.json can't be read .*; replace") as caught:
        text.load_tokenizer(tmp_path, pin)
    assert isinstance(caught.value, QuantmillError)


@given(letters=st.integers(1, 600))
@settings(max_examples=30, deadline=None)
def test_a_short_text_is_refused_with_settings_that_work(letters: int) -> None:
    """Whatever its length: the settings that the message names are taken, and none is named that isn't."""
    dataset, tokenizer = Dataset(path="json"), bytes_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        rows(patch, ["x" * letters])
        wanted = Calibration(dataset=dataset, samples=100, sequence_length=8)
        if message := _refused(lambda: text.calibration_tokens(wanted, tokenizer)):
            most = re.search(r"set samples to at most (\d+),", message)
            assert "add text" in message
            assert (most is not None) == (letters + 1 >= 8)
            if most:
                text.calibration_tokens(wanted.model_copy(update={"samples": int(most[1])}), tokenizer)
        compared = Verification(dataset=dataset, tokens=1024, sequence_length=8)
        if message := _refused(lambda: text.held_out_tokens(compared, tokenizer)):
            most = re.search(r"set tokens to at most (\d+),", message)
            assert "add text" in message
            if most:
                least = Verification(dataset=dataset, tokens=int(most[1]), sequence_length=8)
                text.held_out_tokens(least, tokenizer)


def _refused(action: Callable[[], object]) -> str:
    try:
        action()
    except CalibrationError as error:
        return str(error)
    return ""
