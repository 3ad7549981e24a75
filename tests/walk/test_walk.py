"""Every causal language model of transformers, all the way: the most used in every run, the others by `make walk`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.walk.check import check
from tests.walk.smallest import families
from workers.unsupported import REASONS

MOST_USED = (
    "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gpt_oss", "opt", "bloom", "falcon", "mixtral", "starcoder2",
    "cohere", "cohere2", "olmo2", "granite", "deepseek_v2", "deepseek_v3", "glm4_moe", "stablelm", "mamba", "jamba",
)  # fmt: skip
# Their layers are Conv1D, which no format of linear layers takes.
CONV1D = ("gpt2", "gpt-sw3", "openai-gpt")
# No norm stands right before their linear layers, nothing before them carries a scale.
NO_PAIRS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "jetmoe", "nanochat",
    "rembert", "roberta", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlnet", "xmod",
)  # fmt: skip
# transformers can't load packed weights of theirs; eight bits in a plain tensor it can.
NOT_PACKED = ("blt", "falcon", "modernbert-decoder", "recurrent_gemma", "rwkv", "xlstm")

SUPPORTED = [family for family in families() if family not in REASONS]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers says of its own families is not ours to mend
    pytest.mark.timeout(200),
]


def marked(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in MOST_USED else pytest.mark.walk) for name in names]


@pytest.mark.parametrize("family", marked(SUPPORTED))
def test_a_family_goes_all_the_way(family: str, tmp_path: Path) -> None:
    outcome = check(family, tmp_path)
    assert outcome.weights > 0
    if family in CONV1D:
        assert "Conv1D" in outcome.refused
        return
    assert outcome.refused == ""
    assert outcome.packed == (family not in NOT_PACKED)
    assert (outcome.folds == 0) == (family in NO_PAIRS)


@pytest.mark.walk
@pytest.mark.parametrize("family", sorted(REASONS))
def test_a_refused_family_would_not_get_there(family: str, tmp_path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever breaks, in whichever library
        check(family, tmp_path)


def test_every_family_is_either_supported_or_refused_with_a_reason() -> None:
    known = families()
    assert set(REASONS) <= set(known)
    assert set(MOST_USED) <= set(SUPPORTED)
    assert len(MOST_USED) >= 30
    assert len(SUPPORTED) - len(CONV1D) >= 100
