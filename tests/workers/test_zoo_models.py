"""The models that everything else is tested on: whole, small, and trained well enough that rounding hurts."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open

ZOO = Path(__file__).parents[1] / "zoo"
NAMES = sorted(path.parent.name for path in ZOO.glob("models/*/config.json"))


def test_all_together_are_small() -> None:
    size = sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size < 25e6


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_whole(name: str) -> None:
    folder = ZOO / "models" / name
    _, loading = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        assert {reader.get_slice(key).get_dtype() for key in reader.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    text = 'def f(x: int) -> str:\n    return "a" * x  # Z~!\n'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "# user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert {"LICENSE", "README.md", "generation_config.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_rounding_hurts_the_more_the_fewer_bits(name: str) -> None:
    from tests.zoo import figures

    assert set(NAMES) == set(figures.NAMES)
    torch.manual_seed(0)
    found = figures.measure(name, sequences=4)
    assert found["loss"] < 4.0
    assert found["w4"]["kl"] > 20 * found["w8"]["kl"]
    assert found["w3"]["kl"] > 3 * found["w4"]["kl"]
