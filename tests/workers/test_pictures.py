"""Calibration on pictures: through the model's own processor and the same streamed forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from pipeline.planning.fitting import picture_problems
from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.workers.jobs import ZOO, job
from tests.workers.multimodal import same_statistics, save_llava
from tests.workers.quantize.test_spread import assert_same_artifact, at_once, spread_over
from workers.errors import CalibrationError, UnsupportedModel
from workers.model.pictures import Pictures, load_processor
from workers.model.text import calibration_tokens
from workers.run import run_stage
from workers.spec.data import Calibration, Dataset, Turns
from workers.spec.job import Job, ModelPin, Stage

PIN = ModelPin(id="llava-tiny", revision="0" * 40)
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "orange", "purple"]
ASKED = Dataset(path="json", turns=Turns(user="q", assistant="a"), images="i")
SHOWN = Dataset(path="json", column="messages", images="images")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("multimodal") / "llava-tiny")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Conversations about pictures, one of one colour each, beside the file that names them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("album")
    rows = []
    for number, colour in enumerate(COLOURS * 2):
        Image.new("RGB", (40, 30 + number), colour).save(folder / f"{number}.png")
        asked = [{"type": "image"}, {"type": "text", "text": f"def colour_{number}():"}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": colour}]},
        ]
        rows.append({"messages": messages, "images": [f"{number}.png"]})
    (folder / "album.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SHOWN.model_copy(update={"data_files": (str(folder / "album.jsonl"),)})


def calibrated_on(of: Job, *mixture: Dataset, samples: int = 8) -> Job:
    changed = Calibration(mixture=mixture, samples=samples, sequence_length=128)
    return of.model_copy(update={"calibration": changed})


def test_the_statistics_are_those_of_the_whole_model(llava: Path, album: Dataset) -> None:
    """The oracle: transformers' own forward, with the same inputs and a hook on the same layers."""
    tokenizer, processor = tf.AutoTokenizer.from_pretrained(llava), load_processor(llava, PIN)
    calibration = Calibration(mixture=(album,), samples=4, sequence_length=128)
    found = calibration_tokens(calibration, tokenizer, processor)
    assert found.groups == ()
    assert len(found.shown) == 4
    assert all({"input_ids", "pixel_values"} <= set(inputs) for inputs in found.shown)
    model = tf.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    assert same_statistics(llava, model, found.shown) == len(model.model.language_model.layers)


def test_parts_make_what_one_pass_makes_of_text_and_pictures(llava: Path, album: Dataset, tmp_path: Path) -> None:
    text = Dataset(path="text", data_files=(str(ZOO / "text" / "calibration.txt"),))
    plain, parted = (
        calibrated_on(job(llava, tmp_path / place, "gptq-w4-g128"), text, album) for place in ("plain", "parted")
    )
    assert [made.error for made in at_once(plain).values()] == [None]
    assert [made.error for made in spread_over(parted, 2).values()] == [None]
    assert_same_artifact(plain, parted, "gptq-w4-g128")


@pytest.mark.slow
def test_tokens_after_pictures_count_in_the_metrics(llava: Path, album: Dataset, tmp_path: Path) -> None:
    of = job(llava, tmp_path, "fp8-dynamic")
    shown = of.verification.model_copy(update={"shown": album, "rows": 5})
    of = of.model_copy(update={"verification": shown})
    assert [made.error for made in at_once(of).values()] == [None]
    manifest = run_stage(of, Stage.VERIFY, "fp8-dynamic").manifest
    assert manifest is not None
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.verdict.metrics is not None
    rows = Pictures(album, load_processor(llava, PIN), "").sequences(8192, 5)
    expected = 512 + sum(inputs["input_ids"].shape[1] for inputs in rows)
    assert manifest.verdict.metrics.eval_tokens == expected
    assert manifest.verification.shown == album.public


def prepared(llava: Path, row: dict[str, Any], said: Dataset, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    from workers.model import pictures

    rows = [row]

    class Table(list[Any]):
        column_names = tuple(row)

    monkeypatch.setattr(pictures, "load", lambda dataset, where: Table(rows))
    found = Pictures(said, load_processor(llava, PIN), "calibration.dataset")
    return found, found.sequences(settings.get("length", 128), 1)


def picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (9, 9), "red")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x = 1", "images": picture()}, Dataset(path="json", images="images")),
        (
            {"q": "x?", "a": "1", "i": [picture()]},
            Dataset(path="json", turns=Turns(user="q", assistant="a"), images="i"),
        ),
        ({"messages": [{"role": "user", "content": "x?"}], "images": picture()}, SHOWN),
    ],
)
def test_a_picture_gets_its_place(
    row: dict[str, Any], said: Dataset, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (inputs,) = prepared(llava, row, said, monkeypatch)
    image = tf.AutoConfig.from_pretrained(llava).image_token_id
    assert int((inputs["input_ids"] == image).sum()) == 16
    assert inputs["pixel_values"].shape[0] == 1


def test_a_row_that_is_too_long_is_skipped_and_counted(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"text": "x = 1\n" * 99, "images": picture()}
    found, sequences = prepared(llava, row, Dataset(path="json", images="images"), monkeypatch, length=64)
    assert sequences == []
    assert list(found.notes(64)) == [
        "calibration.dataset: 1 of 1 rows read have more than 64 tokens with their pictures, and were skipped"
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "x", "images": "gone.png"}, r"column 'images' can't be decoded, got 'gone.png' \(.*No such file"),
        ({"text": "x", "images": b"no picture"}, r"can't be decoded, .*cannot identify image file"),
        ({"text": "x", "images": "https://a.b/c.png"}, "the path of a file"),
        ({"text": 7, "images": picture()}, "expected a text or chat messages, got 7"),
        ({"text": "x"}, r"images: no such column, got 'images'; the data set has"),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(
    row: dict[str, Any], why: str, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match=why):
        prepared(llava, row, Dataset(path="json", images="images"), monkeypatch)


def test_models_that_take_no_pictures_are_refused_by_the_plan(llava: Path, album: Dataset, tmp_path: Path) -> None:
    calibration = Calibration(dataset=album)
    text = resolve(ModelEntry(id="llama-tiny"), ZOO / "models")
    assert "takes text alone (LlamaForCausalLM)" in "".join(picture_problems(text, calibration))
    assert list(picture_problems(resolve(ModelEntry(id=llava.name), llava.parent), calibration)) == []
    bare = Path(shutil.copytree(llava, tmp_path / "bare"))
    (bare / "processor_config.json").unlink()
    assert "comes without a processor" in "".join(
        picture_problems(resolve(ModelEntry(id="bare"), tmp_path), calibration)
    )
    with pytest.raises(UnsupportedModel, match=r"'llava-tiny': .*processor"):
        load_processor(bare, PIN)
