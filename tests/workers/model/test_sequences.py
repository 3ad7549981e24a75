"""How text is cut into sequences, mixed, and rendered: what calibration sees."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.model.test_text import TEMPLATE, bytes_tokenizer
from workers.errors import CalibrationError
from workers.model import rows as reading
from workers.model import text
from workers.spec.data import Calibration, Dataset, Turns

A = Dataset(path="a")
HELPFUL = TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"


def sets(monkeypatch: pytest.MonkeyPatch, **columns: dict[str, list[Any]]) -> None:
    """Let data sets be these, by their paths."""
    from datasets import Dataset as Table

    monkeypatch.setattr(reading, "load", lambda dataset, where: Table.from_dict(columns[dataset.path]))


def cut(tokenizer: Any, *datasets: Dataset, **settings: Any) -> list[str]:
    """The sequences of a calibration, as text."""
    found = text.calibration_tokens(Calibration(mixture=datasets, **settings), tokenizer)
    return [str(tokenizer.decode(sequence)) for group in found.groups for sequence in group.tolist()]


ROWS = st.lists(st.text("abc", min_size=1, max_size=40), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.booleans())
def test_single_makes_a_sequence_of_each_row(rows: list[str], bos: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sets(patch, a={"text": rows})
        enough = [row for row in rows if len(row) >= text.LEAST_ROW]
        if not enough:
            return
        found = cut(bytes_tokenizer(bos=bos), A, samples=len(enough), sequence_length=20, sequences="single")
        begin = "<s>" if bos else ""
        longest = 20 - bool(bos)
        assert sorted(found) == sorted(begin + row[:longest] for row in enough)
        lengths = [len(sequence.replace("<s>", "!")) for sequence in found]
        assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.booleans())
def test_documents_begin_with_rows_and_are_full(rows: list[str], bos: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sets(patch, a={"text": rows})
        expected, sequence = [], ""
        for row in rows:
            sequence = f"{sequence}\n{row}" if sequence else "!" * bos + row
            if len(sequence) >= 20:
                expected.append(sequence[:20])
                sequence = ""
        if not expected:
            return
        found = cut(
            bytes_tokenizer(bos=bos),
            Dataset(path="a"),
            samples=len(expected),
            sequence_length=20,
            sequences="documents",
        )
        assert [one.replace("<s>", "!") for one in found] == expected


def test_a_template_that_writes_the_first_token_has_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch, a={"text": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]] * 4})
    (found,) = cut(
        bytes_tokenizer(bos=True, template=TEMPLATE),
        Dataset(path="a"),
        samples=1,
        sequence_length=99,
        sequences="single",
    )
    assert found == "<s><user>Hi\n<assistant>Ho\n"


def test_a_question_ends_with_the_generation_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch, a={"text": [[{"role": "user", "content": "Who?"}]] * 4})
    (found,) = cut(bytes_tokenizer(template=HELPFUL), A, samples=1, sequence_length=99, sequences="single")
    assert found == "<s><user>Who?\n<assistant>"


TURNS = Dataset(path="a", turns=Turns(user="ask", assistant="say", system="be"))


def test_columns_of_an_exchange_are_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"be": ["kind", None, "kind"], "ask": ["Who?", "What?", "Why?"], "say": ["Me", "That", None]}
    sets(monkeypatch, a=table)
    tokenizer = bytes_tokenizer(template=TEMPLATE)
    found = cut(tokenizer, TURNS, samples=2, sequence_length=99, sequences="single")
    assert found == ["<s><system>kind\n<user>Who?\n<assistant>Me\n", "<s><user>What?\n<assistant>That\n"]
    sets(monkeypatch, a={key: values for key, values in table.items() if key != "be"})
    with pytest.raises(CalibrationError, match=r"mixture\.0\.turns: no such column, got 'be'; .*ask"):
        cut(tokenizer, TURNS, samples=2)


def test_without_a_template_conversations_are_refused_or_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch, a={"be": [None], "ask": ["Who is there?"], "say": ["Me"]})
    with pytest.raises(CalibrationError, match=r"no chat template; .*without_template: plain"):
        cut(bytes_tokenizer(), TURNS, samples=1, sequences="single")
    plain = TURNS.model_copy(update={"without_template": "plain"})
    assert cut(bytes_tokenizer(), plain, samples=1, sequences="single") == ["Who is there?\n\nMe\n"]


def test_each_data_set_gives_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch, a={"text": ["a" * 99]}, b={"text": ["b" * 99]})
    found = cut(bytes_tokenizer(), Dataset(path="a", share=3), Dataset(path="b"), samples=8, sequence_length=8)
    assert found == ["a" * 8] * 6 + ["b" * 8] * 2
    with pytest.raises(
        CalibrationError, match=r"samples: got 20 of calibration\.mixture\.1, but the data set holds 12"
    ):
        cut(bytes_tokenizer(), Dataset(path="a"), Dataset(path="b", share=20), samples=21, sequence_length=8)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 1000))
def test_shares_give_all_samples_and_are_off_by_less_than_one(shares: list[float], samples: int) -> None:
    mixture = tuple(Dataset(path="a", share=share) for share in shares)
    calibration = Calibration(mixture=mixture, samples=samples)
    assert sum(calibration.counts) == samples
    for share, count in zip(shares, calibration.counts, strict=True):
        assert abs(count - samples * share / sum(shares)) < 1 + 1e-6


def test_a_length_that_is_not_given_fits_the_model() -> None:
    left_out, given = (
        Calibration(dataset=Dataset(path="a")),
        Calibration(dataset=Dataset(path="a"), sequence_length=2048),
    )
    assert left_out.within(512).sequence_length == 512
    assert left_out.within(None).sequence_length == left_out.within(4096).sequence_length == 2048
    assert given.within(512).sequence_length == 2048  # the plan refuses it by name
