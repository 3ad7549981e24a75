"""Turns text into token sequences of equal length, for calibration and for the comparison with the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from workers.errors import CalibrationError, UnsupportedModel
from workers.spec.job import Calibration, Dataset, ModelPin, Verification
from workers.transfer.hub import hub_errors

# Sequences are drawn from the first POOL times as many: spread over the text without tokenizing the whole corpus.
POOL = 4
ROWS_AT_A_TIME = 256


def load_tokenizer(folder: Path, pin: ModelPin) -> Any:
    """Load the model's own tokenizer.

    Raises:
        UnsupportedModel: transformers can't load one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=pin.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"models: {pin.id!r} has no tokenizer that transformers loads ({error})") from error


def calibration_tokens(calibration: Calibration, tokenizer: Any) -> torch.Tensor:
    """Calibration tokens, int64 [samples, sequence_length], sampled by the seed.

    Raises:
        CalibrationError: unreadable data, or fewer sequences than requested.
    """
    samples, length = calibration.samples, calibration.sequence_length
    pool = sequences(calibration.dataset, tokenizer, length, POOL * samples, "calibration.dataset")
    if len(pool) < samples:
        raise CalibrationError(
            f"calibration.samples: got {samples}, but the data set holds {len(pool)} sequences of {length} tokens; "
            f"set samples to at most {len(pool)}, shorten sequence_length, or add text"
        )
    return pool[sorted(random.Random(calibration.seed).sample(range(len(pool)), samples))]


def held_out_tokens(verification: Verification, tokenizer: Any) -> torch.Tensor:
    """Held-out tokens from the start of the text, int64 [sequences, sequence_length], at least ``tokens`` in total.

    Raises:
        CalibrationError: unreadable data, or fewer tokens than requested.
    """
    length = verification.sequence_length
    wanted = -(-verification.tokens // length)
    held_out = sequences(verification.dataset, tokenizer, length, wanted, "verify.dataset")
    if len(held_out) < wanted:
        raise CalibrationError(
            f"verify.tokens: got {verification.tokens}, but the data set holds {len(held_out) * length} in sequences "
            f"of {length}; set tokens to at most {len(held_out) * length}, or add text"
        )
    return held_out


def sequences(dataset: Dataset, tokenizer: Any, length: int, at_most: int, where: str) -> torch.Tensor:
    """Tokenize the rows as one stream, and cut it: int64 [n <= at_most, length]; a short last piece is dropped."""
    tokens: list[int] = []
    for text in _texts(dataset, where):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= at_most * length:
            break
    count = min(len(tokens) // length, at_most)
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def _texts(dataset: Dataset, where: str) -> Iterator[str]:
    """Yield the text in chunks of rows: tokenizing row by row is slow, and all at once needs too much memory."""
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
