"""Shows the first sequences of a calibration as the model sees them: a process that answers a question about text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from workers.machine.failures import describe
from workers.model.pictures import processor_of
from workers.model.text import calibration_tokens, load_tokenizer
from workers.spec.base import Frozen
from workers.spec.data import Calibration
from workers.spec.job import Failure, ModelPin


class SampleRequest(Frozen):
    """Which sequences to show: the first ``shown`` of each data set; ``model.folder`` has the tokenizer's files."""

    model: ModelPin
    calibration: Calibration
    shown: int


class Piece(Frozen):
    """A part of a sequence: its text, or that of special tokens."""

    text: str
    special: bool


class Shown(Frozen):
    """A sequence: where it is from, its length in tokens, and its pieces."""

    dataset: str
    tokens: int
    pieces: tuple[Piece, ...]


class SampleAnswer(Frozen):
    """The sequences, or why there are none."""

    sequences: tuple[Shown, ...] = ()
    failure: Failure | None = None


def answer(request: str) -> str:
    """A ``SampleAnswer`` for a ``SampleRequest``, both as JSON."""
    asked = SampleRequest.model_validate_json(request)
    try:
        return SampleAnswer(sequences=tuple(_shown(asked))).model_dump_json()
    except Exception as error:
        return SampleAnswer(failure=describe(error)).model_dump_json()


def _shown(asked: SampleRequest) -> Iterable[Shown]:
    folder, calibration = Path(asked.model.folder or ""), asked.calibration
    tokenizer, processor = load_tokenizer(folder, asked.model), processor_of(calibration.datasets, folder, asked.model)
    for dataset in calibration.datasets:
        alone = calibration.model_copy(update={"dataset": dataset, "mixture": (), "samples": asked.shown})
        found = calibration_tokens(alone, tokenizer, processor)
        for group in (*found.groups, *(inputs["input_ids"] for inputs in found.shown)):
            for sequence in group.tolist():
                yield Shown(dataset=dataset.called, tokens=len(sequence), pieces=tuple(_pieces(sequence, tokenizer)))


def _pieces(tokens: list[int], tokenizer: Any) -> Iterable[Piece]:
    special = set(tokenizer.all_special_ids) | _added(tokenizer)
    for is_special, run in groupby(tokens, lambda token: token in special):
        yield Piece(text=tokenizer.decode(list(run), skip_special_tokens=False), special=is_special)


def _added(tokenizer: Any) -> set[int]:
    """Tokens beyond the vocabulary that a chat template writes, which not every tokenizer lists as special."""
    return {id_ for id_, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
