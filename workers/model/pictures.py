"""Rows with pictures or sounds, as the model's own processor prepares them: each is a sequence of its own.

A sequence can't be cut within a picture, and rows differ in length, so that nothing is joined, cut or padded.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from workers.errors import CalibrationError, QuantmillError, UnsupportedModel
from workers.model.rows import ROWS_AT_A_TIME, chat_turns, exchange, load
from workers.spec.bounds import brief, printable
from workers.spec.data import Dataset
from workers.spec.job import ModelPin

# What a model takes of one sequence, by name; ``input_ids`` int64 [1, T].
Inputs = dict[str, Tensor]
# Hertz of sounds for a processor that doesn't say it.
RATE = 16000


def load_processor(folder: Path, pin: ModelPin) -> Any:
    """Load the model's own processor.

    Raises:
        UnsupportedModel: transformers can't load one, or it prepares text alone.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=pin.trust_remote_code)
    except QuantmillError:
        raise
    except Exception as error:  # processors and remote code raise whatever they like
        raise UnsupportedModel(
            f"models: {pin.id!r}: no processor that transformers loads ({brief(error)}); add the original model's "
            "processor files, or name data without images and audio"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise UnsupportedModel(
            f"models: {pin.id!r}: its processor ({type(processor).__name__}) prepares text alone; name data without "
            "images and audio"
        )
    return processor


def processor_of(datasets: Iterable[Dataset | None], folder: Path, pin: ModelPin) -> Any:
    """The model's processor if a data set shows pictures or sounds; else None.

    Raises:
        UnsupportedModel: see ``load_processor``.
    """
    shows = any(dataset.shows for dataset in datasets if dataset)
    return load_processor(folder, pin) if shows else None


class Pictures:
    """The rows of a data set with pictures or sounds; counts those that are left out.

    ``where`` is the data set's key in a zoo file, as messages name it.
    """

    def __init__(self, dataset: Dataset, processor: Any, where: str) -> None:
        self._dataset, self._processor, self._where = dataset, processor, where
        self._long = self._read = 0

    def sequences(self, length: int, at_most: int) -> list[Inputs]:
        """The first rows of at most ``length`` tokens: what the model takes, by name; ``input_ids`` int64 [1, T].

        Raises:
            CalibrationError: a column is lacking, or a row that the processor doesn't take.
        """
        found: list[Inputs] = []
        for number, row in self._rows():
            if len(found) == at_most:
                break
            self._read += 1
            inputs = self._prepared(number, row)
            if inputs["input_ids"].shape[1] > length:
                self._long += 1
            else:
                found.append(inputs)
        return found

    def notes(self, length: int) -> Iterator[str]:
        """What was left out."""
        if self._long:
            yield (
                f"{self._where}: {self._long} of {self._read} rows read have more than {length} tokens with their "
                "pictures, and were skipped"
            )

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = self._dataset
        rows = load(dataset, self._where)
        said = dataset.turns.columns if dataset.turns else (dataset.column,)
        for key, names in (("images", (dataset.images,)), ("audio", (dataset.audio,)), ("column", said)):
            if lacking := [name for name in names if name and name not in (rows.column_names or [])]:
                raise CalibrationError(
                    f"{self._where}.{key}: no such column, got {lacking[0]!r}; the data set has {rows.column_names}"
                )
        rows = self._at_the_processors_rate(rows)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            for number in range(start, min(start + ROWS_AT_A_TIME, len(rows))):
                yield number, self._row(rows, number)

    def _row(self, rows: Any, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = rows[number]
        except ImportError as error:  # datasets decodes sounds with another package
            raise CalibrationError(
                f"{self._where}.audio: datasets can't decode column {self._dataset.audio!r} ({brief(error)}); run "
                "`pip install torchcodec`, or name a column of samples (array and sampling_rate)"
            ) from error
        return row

    @property
    def _rate(self) -> int:
        """Hertz of the sounds that the processor takes."""
        return int(getattr(getattr(self._processor, "feature_extractor", None), "sampling_rate", None) or RATE)

    def _at_the_processors_rate(self, rows: Any) -> Any:
        """Rows whose sounds are resampled where they are decoded."""
        column = self._dataset.audio
        if column is None:
            return rows
        from datasets import Audio

        decoded = isinstance((getattr(rows, "features", None) or {}).get(column), Audio)
        return rows.cast_column(column, Audio(sampling_rate=self._rate)) if decoded else rows

    def _prepared(self, number: int, row: Mapping[str, Any]) -> Inputs:
        images = self._files(number, row, self._dataset.images, self._picture)
        audio = self._files(number, row, self._dataset.audio, self._sound)
        text = self._text(number, row, len(images), len(audio))
        begins = getattr(self._processor.tokenizer, "bos_token", None)
        given = {"images": images or None, "audio": audio or None}
        # A chat template writes the first token itself.
        special = {"add_special_tokens": False} if begins and text.startswith(begins) else {}
        try:
            inputs = self._processor(
                text=text, return_tensors="pt", **{name: value for name, value in given.items() if value}, **special
            )
            prepared = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        except Exception as error:  # processors raise whatever they like
            raise self._refused(number, f"the model's processor doesn't take it ({brief(error)})") from error
        mask = prepared.get("attention_mask")
        if mask is not None and bool(mask.all()):
            del prepared["attention_mask"]  # nothing is padded, and the mask of text alone is left out, too
        return prepared

    def _files(self, number: int, row: Mapping[str, Any], column: str | None, read: Any) -> list[Any]:
        """The pictures or sounds of a row, each as ``read`` makes it of what the column holds."""
        value = row[column] if column else None
        items = value if isinstance(value, list) else [] if value is None else [value]
        found = []
        for item in items:
            try:
                found.append(read(item))
            except Exception as error:  # decoders raise whatever they like
                got = printable(repr(item))[:80]
                why = f"column {column!r} can't be decoded, got {got} ({brief(error)})"
                raise self._refused(number, why) from error
        return found

    def _picture(self, item: Any) -> Any:
        from PIL import Image

        picture = Image.open(self._content(item)) if isinstance(item, str | bytes | dict) else item
        return picture.convert("RGB")

    def _sound(self, item: Any) -> Any:
        """Samples of one channel at the processor's rate, float32 [n].

        Raises:
            ValueError: they have another rate, or it's no sound.
        """
        if isinstance(item, Mapping) and "array" in item:
            rate = item.get("sampling_rate", self._rate)
            if rate != self._rate:
                raise ValueError(
                    f"sampled at {rate} Hz, and the model's processor takes {self._rate}; resample them, or name a "
                    "column of the type Audio"
                )
            return np.asarray(item["array"], dtype=np.float32)
        if hasattr(item, "get_all_samples"):
            return item.get_all_samples().data.mean(0).numpy()
        raise ValueError("expected a column of the type Audio, or of samples (array and sampling_rate)")

    def _content(self, item: Any) -> io.BytesIO | Path:
        """The file of a picture: bytes, or a path beside the data files."""
        if isinstance(item, Mapping):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            return io.BytesIO(item)
        if not isinstance(item, str) or "://" in item:
            raise ValueError("expected a picture, its bytes, or the path of a file")
        path = Path(item)
        folders = [Path(name).parent for name in self._dataset.data_files] or [Path()]
        return path if path.is_absolute() else next((f / path for f in folders if (f / path).is_file()), path)

    def _text(self, number: int, row: Mapping[str, Any], images: int, audio: int) -> str:
        """What is said about the pictures, with a place for each of them."""
        turns = self._turns(number, row)
        places = [{"type": "image"}] * images + [{"type": "audio"}] * audio
        has_places = any(
            part.get("type") in ("image", "audio") for turn in turns if isinstance(turn["content"], list)
            for part in turn["content"]
        )  # fmt: skip
        if not has_places:
            first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            content = first["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            first["content"] = [*places, *parts]
        if not getattr(self._processor, "chat_template", None):
            return self._plain(turns)
        asks = turns[-1]["role"] != "assistant"
        try:
            said = str(self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))
            # A template of text alone has no place for pictures.
            return said if said.count(self._mark("image")) >= images else self._plain(turns)
        except Exception as error:  # templates raise jinja's errors, and their own
            raise self._refused(number, f"the chat template doesn't take it ({brief(error)})") from error

    def _plain(self, turns: list[dict[str, Any]]) -> str:
        """Without a chat template: the places of pictures, and the texts one after the other."""
        parts = [
            part if isinstance(part, dict) else {"type": "text", "text": part}
            for turn in turns
            for part in (turn["content"] if isinstance(turn["content"], list) else [turn["content"]])
        ]
        return "\n".join(
            str(part.get("text", "")) if part["type"] == "text" else self._mark(part["type"]) for part in parts
        )

    def _mark(self, kind: str) -> str:
        """The text that stands for a picture or sound."""
        return str(getattr(self._processor, f"{kind}_token", None) or f"<{kind}>")

    def _turns(self, number: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        dataset = self._dataset
        if dataset.turns is not None:
            value: Any = exchange(*(row[name] if name else None for name in dataset.turns.ordered))
        else:
            value = row[dataset.column]
        if isinstance(value, str) and value:
            return [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            kind = printable(repr(value))[:80]
            raise self._refused(number, f"expected a text or chat messages, got {kind}")
        return list(chat_turns(value, f"{self._where}.column {dataset.column!r}", pictures=True))

    def _refused(self, number: int, why: str) -> CalibrationError:
        return CalibrationError(f"{self._where}: row {number}: {why}; mend or remove the row, or name other data")
