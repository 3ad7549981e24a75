"""Text into token sequences of one length: for calibration, and for the comparison with the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from workers.errors import CalibrationError, UnsupportedModel
from workers.spec.job import Calibration, Dataset, ModelPin, Verification
from workers.transfer.hub import hub_errors

# Sequences are drawn from the first POOL times as many: spread over the text, without tokenizing a whole corpus.
POOL = 4
ROWS_AT_A_TIME = 256


def load_tokenizer(folder: Path, pin: ModelPin) -> Any:
    """The model's own tokenizer.

    Raises:
        UnsupportedModel: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=pin.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"models: {pin.id!r} has no tokenizer that transformers loads ({error})") from error


def calibration_tokens(calibration: Calibration, tokenizer: Any) -> torch.Tensor:
    """int64 [samples, sequence_length], drawn by the seed.

    Raises:
        CalibrationError: unreadable data, or fewer sequences than asked for.
    """
    asked, length = calibration.samples, calibration.sequence_length
    pool = sequences(calibration.dataset, tokenizer, length, POOL * asked, "calibration.dataset")
    if len(pool) < asked:
        raise CalibrationError(
            f"calibration.samples: got {asked}, but the data set holds {len(pool)} sequences of {length} tokens; "
            f"set samples to at most {len(pool)}, shorten sequence_length, or add text"
        )
    return pool[sorted(random.Random(calibration.seed).sample(range(len(pool)), asked))]


def held_out_tokens(verification: Verification, tokenizer: Any) -> torch.Tensor:
    """int64 [sequences, sequence_length], from the start of the text, at least ``tokens`` of them together.

    Raises:
        CalibrationError: unreadable data, or fewer tokens than promised.
    """
    length = verification.sequence_length
    wanted = -(-verification.tokens // length)
    found = sequences(verification.dataset, tokenizer, length, wanted, "verify.dataset")
    if len(found) < wanted:
        raise CalibrationError(
            f"verify.tokens: got {verification.tokens}, but the data set holds {len(found) * length} in sequences of "
            f"{length}; set tokens to at most {len(found) * length}, or add text"
        )
    return found


def sequences(dataset: Dataset, tokenizer: Any, length: int, at_most: int, where: str) -> torch.Tensor:
    """int64 [n <= at_most, length]: the rows as one stream of tokens, cut into pieces; the last, short one is left."""
    tokens: list[int] = []
    for text in _texts(dataset, where):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= at_most * length:
            break
    count = min(len(tokens) // length, at_most)
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def _texts(dataset: Dataset, where: str) -> Iterator[str]:
    """The text in pieces of some hundred rows: tokenizing row by row is slow, and all at once needs memory."""
    rows = _load(dataset, where)
    if dataset.column not in (rows.column_names or []):
        raise CalibrationError(
            f"{where}.column: no such column, got {dataset.column!r}; the data set has {rows.column_names}"
        )
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        texts = rows[start : start + ROWS_AT_A_TIME][dataset.column]
        yield dataset.separator.join(str(text) for text in texts) + dataset.separator


def _load(dataset: Dataset, where: str) -> Any:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    try:
        return load_dataset(
            dataset.path,
            dataset.name,
            data_files=list(dataset.data_files) or None,
            split=dataset.split,
            revision=dataset.revision,
        )
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise CalibrationError(f"{where}: datasets can't read it, got {dataset.path!r} ({error})") from error


def fetch_dataset(dataset: Dataset, where: str) -> None:
    """Bring a data set into the client's cache, where later stages find it.

    Raises:
        CalibrationError: unreadable.
        HubUnavailable, DiskFull: as ``hub.hub_errors`` says.
    """
    with hub_errors(f"{where}: {dataset.path}"):
        _load(dataset, where)
