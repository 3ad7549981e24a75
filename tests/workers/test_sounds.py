"""Calibration on sounds: through the model's own processor and the same streamed forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
import transformers as tf

from tests.workers.jobs import job, recipe
from tests.workers.multimodal import same_statistics, save_qwen2_audio
from workers.errors import CalibrationError
from workers.model import pictures
from workers.model.pictures import Pictures, load_processor
from workers.model.text import calibration_tokens
from workers.run import run_stage
from workers.spec.data import Calibration, Dataset, Turns
from workers.spec.job import ModelPin, Stage

PIN = ModelPin(id="qwen2-audio-tiny", revision="0" * 40)
HEARD = Dataset(path="json", turns=Turns(user="asked", assistant="said"), audio="sound")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_audio(tmp_path_factory.mktemp("sounds") / "qwen2-audio-tiny")


def sound(number: int, rate: int = 16000) -> dict[str, Any]:
    """A tone of up to half a second, with its samples."""
    seconds = torch.arange(0, 0.2 + 0.05 * number, 1 / rate)
    return {"array": (0.5 * torch.sin(6283 * (1 + number) * seconds)).tolist(), "sampling_rate": rate}


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("tones") / "tones.jsonl"
    rows = [{"asked": "What is it?", "said": f"tone {n} of six", "sound": sound(n)} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return HEARD.model_copy(update={"data_files": (str(path),)})


def test_the_statistics_are_those_of_the_whole_model(model: Path, tones: Dataset) -> None:
    """The oracle: transformers' own forward, with the same inputs and a hook on the same layers."""
    calibration = Calibration(mixture=(tones,), samples=4, sequence_length=128)
    processor = load_processor(model, PIN)
    found = calibration_tokens(calibration, tf.AutoTokenizer.from_pretrained(model), processor)
    assert len(found.shown) == 4
    assert all({"input_ids", "input_features", "feature_attention_mask"} <= set(inputs) for inputs in found.shown)
    whole = tf.Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    assert same_statistics(model, whole, found.shown) == 2


@pytest.mark.slow
def test_it_is_made_on_sounds_and_accepted(model: Path, tones: Dataset, tmp_path: Path) -> None:
    of = job(model, tmp_path, recipe(name="w4", method="gptq", scheme={"bits": 4, "group_size": 32}))
    of = of.model_copy(update={"calibration": Calibration(mixture=(tones,), samples=4, sequence_length=128)})
    result = run_stage(of, Stage.QUANTIZE)
    assert [made.error for made in result.artifacts] == [None], result.failure
    manifest = run_stage(of, Stage.VERIFY, "w4").manifest
    assert manifest is not None
    assert manifest.verdict.accepted, manifest.verdict.reasons


class Table(list[Any]):
    """Rows of a data set, as ``datasets`` gives them."""

    column_names = ("asked", "said", "sound")
    features: ClassVar[Any] = None

    def cast_column(self, name: str, feature: Any) -> Any:
        assert (name, feature.sampling_rate) == ("sound", 16000)
        return self


def read(model: Path, rows: Table, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(pictures, "load", lambda dataset, where: rows)
    return Pictures(HEARD, load_processor(model, PIN), "calibration.dataset").sequences(128, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (sound(0, 8000), "row 0: column 'sound' can't be decoded, .*sampled at 8000 Hz.*takes 16000; resample them"),
        ("tone.wav", "expected a column of the type Audio, or of samples"),
        ({"array": ["loud"]}, "row 0: column 'sound' can't be decoded"),
    ],
)
def test_bad_sounds_are_named(given: Any, said: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match=said):
        read(model, Table([{"asked": "a", "said": "b", "sound": given}]), monkeypatch)


def test_sounds_are_resampled_where_datasets_decodes_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Undecodable(Table):
        features: ClassVar[Any] = {"sound": datasets.Audio()}

        def __getitem__(self, index: Any) -> Any:
            raise ImportError("To support decoding audio data, please install 'torchcodec'.")

    with pytest.raises(CalibrationError, match=r"can't decode column 'sound' .*run `pip install torchcodec`"):
        read(model, Undecodable([{}]), monkeypatch)
