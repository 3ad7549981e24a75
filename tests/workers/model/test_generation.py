"""Whatever stands in generation_config.json: the same greedy tokens, and files that transformers fails on are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.families import save_random
from workers.model.generation import GENERATION_CONFIG, failing_settings, greedy, token_ids
from workers.verify.runtimes.transformers import _continued

NEW = 6
PROMPT = torch.tensor([[5, 40, 7, 61], [3, 9, 33, 90]])
KEYS = [
    *sorted(set(tf.GenerationConfig().to_dict()) - {"transformers_version"}),
    "eos_token_id", "stop_strings", "num_return_sequences", "sequence_bias", "forced_bos_token_id", "validate",
    "to_dict",
]  # fmt: skip
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 95, 96, 2**31, 2**70, 0.0, 0.3, 1.5, -2.0, 1e30, "x", "static", "hybrid", ""]),
    st.lists(st.sampled_from([1, 2, 5, -3, 2**70, "a", 0.5, None, True, [1, 2]]), max_size=3),
    st.dictionaries(st.sampled_from(["greenlist_ratio", "bias", "max_length", "a"]), st.sampled_from([1, -1, "a"])),
)
PECULIAR = {
    "stop_strings": ["</s>"],
    "num_return_sequences": 3,
    "num_beams": 4,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "return_dict_in_generate": True,
    "output_scores": True,
    "bad_words_ids": [[5]],
    "forced_eos_token_id": 2,
    "suppress_tokens": list(range(3, 90)),
    "begin_suppress_tokens": list(range(3, 90)),
    "cache_implementation": "static",
    "watermarking_config": {"greenlist_ratio": 0.5, "bias": 90.0},
    "min_new_tokens": 5,
    "max_length": 3,
    "max_time": 1e-9,
    "do_sample": True,
    "guidance_scale": 4.0,
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random("llama", folder)
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def plain(model: Path) -> list[list[int]]:
    """The most likely tokens, one by one."""
    loaded, tokens = tf.AutoModelForCausalLM.from_pretrained(model), PROMPT
    with torch.inference_mode():
        for _ in range(NEW):
            tokens = torch.cat([tokens, loaded(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    rows: list[list[int]] = tokens[:, PROMPT.shape[1] :].tolist()
    assert all(len(set(row)) > 1 for row in rows)
    return rows


@torch.inference_mode()
def continued(folder: Path) -> tuple[list[list[int]], list[str]]:
    """As the runtime's process does it, whose settings keep those in the folder from being read."""
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder, generation_config=tf.GenerationConfig())
    return _continued(loaded, folder, PROMPT, NEW)


def until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]


def check(folder: Path, said: Any, plain: list[list[int]]) -> None:
    ends = (token_ids(said.get("eos_token_id")) if isinstance(said, dict) else []) or [2]
    assert continued(folder) == ([until(row, ends) for row in plain], [])
    failing = failing_settings(folder)
    if failing is None:
        tf.AutoModelForCausalLM.from_pretrained(folder)
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of any class, which the reason names
            tf.AutoModelForCausalLM.from_pretrained(folder)
        assert failing[1].startswith(type(caught.value).__name__)


@pytest.mark.parametrize("name", PECULIAR)
def test_peculiarities_change_no_token(name: str, model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({name: PECULIAR[name]}))
    check(tmp_path, PECULIAR, plain)


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=6))
def test_odd_settings_change_no_token(model: Path, plain: list[list[int]], said: dict[str, Any]) -> None:
    (model / GENERATION_CONFIG).write_text(json.dumps(said))
    check(model, said, plain)
    (model / GENERATION_CONFIG).unlink()


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'"x"', b"3", b"\xff\xfe{}", b"[" * 100_000])
def test_files_of_another_shape_change_no_token(
    content: bytes, model: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / GENERATION_CONFIG).write_bytes(content)
    check(tmp_path, None, plain)


@pytest.mark.parametrize("said", [{"num_return_sequences": 3}, {"early_stopping": 5}, {"repetition_penalty": 2.0}])
def test_settings_in_the_config_change_no_token(
    said: dict[str, Any], model: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    check(tmp_path, None, plain)
    assert (failing_settings(tmp_path) or ["none"])[0] == ("none" if "repetition_penalty" in said else "config.json")


def test_ids_are_those_of_the_file_and_else_the_configs(model: Path, tmp_path: Path) -> None:
    config = tf.LlamaConfig(eos_token_id=[2, 5], bos_token_id=1, pad_token_id=None)
    found = greedy(tmp_path, config, 3)
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id, found.max_new_tokens) == ([2, 5], 1, 2, 3)
    (tmp_path / GENERATION_CONFIG).write_text('{"eos_token_id": [7, "x", -1], "pad_token_id": 0, "top_k": 3}')
    found = greedy(tmp_path, config, 3)
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id, found.top_k) == ([7], 1, 0, None)


def test_ids_may_be_anything() -> None:
    assert token_ids(3) == token_ids([3]) == token_ids([3, None, True, "3", 3.0, -1, 2**40]) == [3]
    assert token_ids(None) == token_ids(True) == token_ids({}) == token_ids("3") == []
