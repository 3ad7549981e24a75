"""Every causal and multimodal language model of transformers, all the way: the most used in every run, the others by
`make walk`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from workers.spec.families import FAMILIES

MOST_USED = (
    "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gpt_oss", "opt", "bloom", "falcon", "mixtral", "starcoder2",
    "cohere", "cohere2", "olmo2", "granite", "deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text", "stablelm",
    "mamba", "jamba",
)  # fmt: skip
# Their layers are Conv1D, which no format of linear layers takes.
CONV1D = ("gpt2", "gpt-sw3", "openai-gpt")
# Families that the plan takes in these formats, and refuses integers in compressed-tensors of.
OTHER_FORMATS = {
    **dict.fromkeys(CONV1D, "bitsandbytes"),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "olmo_hybrid"), "fp8 and bitsandbytes"),
}
MULTIMODAL_OTHER_FORMATS = {
    **dict.fromkeys(("inkling_mm_model", "molmo2", "qianfan_ocr", "qwen3_omni_moe"), "bitsandbytes"),
    **dict.fromkeys(("dots3_note", "glm5_next", "minimax_m3_vl", "step3p7"), "fp8 and bitsandbytes"),
}
# No norm stands right before their linear layers, nothing before them carries a scale.
NO_PAIRS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "jetmoe",
    "nanochat", "rembert", "roberta", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlnet", "xmod",
)  # fmt: skip
# transformers can't load packed weights of theirs; eight bits in a plain tensor it can.
NOT_PACKED = ("blt", "falcon", "modernbert-decoder", "recurrent_gemma", "rwkv", "xlstm")
# Their checkpoints hold all experts of a layer (XLNet: all heads) in one tensor, which stays as it is: of the layers'
# numbers only this share, of the smallest model, gets codes.
MOSTLY_KEPT = {
    "aria_text": 0.27, "dbrx": 0.11, "gpt_oss": 0.11, "granitemoe": 0.11, "granitemoe_swa": 0.11,
    "granitemoehybrid": 0.28, "granitemoeshared": 0.11, "hy_v4": 0.50, "inkling2_text": 0.26, "inkling_text": 0.19,
    "jetmoe": 0.04, "minimax_m3_vl_text": 0.20, "xlnet": 0.44, "zaya": 0.32,
}  # fmt: skip
# A kind of layer counts as quantized from this share on; what is left are routers, convolutions, state matrices.
MOST = 0.9
# What breaks when one that is refused is taken all the way.
BREAKS = {
    "emu3": "Unrecognized configuration class .*Emu3TextConfig",
    "gemma4_assistant": "layer types producing a cache is different",
    "gemma4_unified_assistant": "layer types producing a cache is different",
    "hrm_text": "its forward comes to a layer again after the last",
    "mllama": "Unrecognized configuration class .*MllamaTextConfig",
    "musicgen": "'MusicgenConfig' object has no attribute",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute",
    "prophetnet": "'NoneType' object has no attribute 'view'",
}
# transformers builds no model of their config class's defaults.
NO_DEFAULT = (
    "cohere_compass_text", "dbrx", "dots1", "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron",
    "qwen4_exp", "qwen4_exp_text", "reformer",
)  # fmt: skip

# Refused as a whole, or as a text model alone; and those whose class imports a package that isn't here.
REFUSED_ALWAYS = {name for name, family in FAMILIES.items() if family.refused}
REFUSED_ALONE = {name for name, family in FAMILIES.items() if family.refused_alone}
REFUSED_WHOLE = {name for name, family in FAMILIES.items() if family.refused_whole}
PACKAGE_MISSING = {name for name, row in FAMILIES.items() if row.package and find_spec(row.package) is None}
# Multimodal ones in every run; the others by `make walk`.
MOST_USED_MULTIMODAL = ("gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "llava", "mistral3", "kimi_k25")
# Those that take longer: `make test-slow`.
SLOW_MULTIMODAL = ("gemma4", "glm4v_moe", "internvl", "llama4", "phi4_multimodal", "qwen3_5")
# All experts of a layer in one tensor, as in MOSTLY_KEPT, or in bitsandbytes, or tensors that transformers splits.
MULTIMODAL_MOSTLY_KEPT = {
    "aria": 0.27, "glm5_next": 0.84, "inkling2": 0.26, "inkling_mm_model": 0.19, "mistral4": 0.35, "molmo2": 0.33,
    "muse_spark": 0.33, "qwen3_omni_moe": 0.20, "qwen3_vl_moe": 0.20, "step3p7": 0.86,
}  # fmt: skip


def refused() -> set[str]:
    """Causal LMs that the plan refuses."""
    from tests.walk.smallest import families

    return (REFUSED_ALWAYS | REFUSED_ALONE | PACKAGE_MISSING) & set(families())


def supported(*, multimodal: bool = False) -> list[str]:
    from tests.walk.smallest import families

    without = REFUSED_ALWAYS | PACKAGE_MISSING | (REFUSED_WHOLE if multimodal else REFUSED_ALONE)
    return [family for family in families(multimodal=multimodal) if family not in without]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The most used families; the others, whose names transformers has, only where the walk is asked for."""
    if metafunc.definition.get_closest_marker("parametrize"):
        return
    asked = metafunc.config.option.markexpr.replace("not walk", "")
    everything = "walk" in asked or not metafunc.config.option.markexpr
    chosen = (("family", MOST_USED, ()), ("multimodal_family", MOST_USED_MULTIMODAL, SLOW_MULTIMODAL))
    for fixture, most, slower in chosen:
        if fixture in metafunc.fixturenames:
            names = supported(multimodal=most is MOST_USED_MULTIMODAL) if everything else [*most, *slower]
            marks: dict[str, Any] = dict.fromkeys(names, pytest.mark.walk)
            marks |= dict.fromkeys(most, ()) | dict.fromkeys(slower, pytest.mark.slow)
            metafunc.parametrize(fixture, [pytest.param(name, marks=marks[name]) for name in names])


def test_a_family_goes_all_the_way(family: str, tmp_path: Path) -> None:
    from tests.walk.check import check

    outcome = check(family, tmp_path)
    if family in MOSTLY_KEPT:
        assert outcome.share == pytest.approx(MOSTLY_KEPT[family], abs=0.01)
    else:
        assert outcome.share > MOST
    assert outcome.format == OTHER_FORMATS.get(family, "")
    if outcome.format:
        return
    assert outcome.refused == ""
    assert outcome.packed == (family not in NOT_PACKED)
    assert (outcome.folds == 0) == (family in NO_PAIRS)


def test_a_multimodal_family_goes_all_the_way(multimodal_family: str, tmp_path: Path) -> None:
    from tests.walk.check import check

    outcome = check(multimodal_family, tmp_path, multimodal=True)
    assert outcome.refused == ""
    assert outcome.format == MULTIMODAL_OTHER_FORMATS.get(multimodal_family, "")
    if multimodal_family in MULTIMODAL_MOSTLY_KEPT:
        assert outcome.share == pytest.approx(MULTIMODAL_MOSTLY_KEPT[multimodal_family], abs=0.01)
    else:
        assert outcome.share > MOST


def test_the_smallest_model_has_every_kind_of_layer(family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tests.walk.check import layer_kinds
    from tests.walk.smallest import smallest_config

    if family in NO_DEFAULT:
        with pytest.raises((AssertionError, AttributeError, KeyError, TypeError)):
            layer_kinds(CONFIG_MAPPING[family]())
        return
    lacking = layer_kinds(CONFIG_MAPPING[family]()) - layer_kinds(smallest_config(family))
    assert not lacking


@pytest.mark.walk
@pytest.mark.parametrize("family", sorted(BREAKS))
def test_a_refused_family_breaks_where_its_reason_says(family: str, tmp_path: Path) -> None:
    from tests.walk.check import check

    with pytest.raises(Exception, match=f"(?s){BREAKS[family]}"):
        check(family, tmp_path, planned=False)


@pytest.mark.walk
@pytest.mark.parametrize("family", sorted({*OTHER_FORMATS, *MULTIMODAL_OTHER_FORMATS} - set(CONV1D)))
def test_integers_break_on_loading_where_the_plan_names_other_formats(family: str, tmp_path: Path) -> None:
    from tests.walk.check import check

    with pytest.raises((RuntimeError, ValueError), match=r"automatic conversion of the weights|only have one to many"):
        check(family, tmp_path, multimodal=family in MULTIMODAL_OTHER_FORMATS, planned=False)


def test_every_family_is_either_supported_or_refused_with_a_reason() -> None:
    from tests.walk.smallest import families

    known = families()
    assert {*known, *families(multimodal=True)} >= REFUSED_ALWAYS | REFUSED_ALONE
    assert set(BREAKS) == refused() - PACKAGE_MISSING
    assert {*MOST_USED_MULTIMODAL, *SLOW_MULTIMODAL, *MULTIMODAL_MOSTLY_KEPT, *MULTIMODAL_OTHER_FORMATS} <= set(
        supported(multimodal=True)
    )
    assert {*MOST_USED, *OTHER_FORMATS, *NO_PAIRS, *NOT_PACKED, *MOSTLY_KEPT, *NO_DEFAULT} <= set(supported())
    assert len(MOST_USED) >= 30
    assert len(supported()) - len(CONV1D) >= 100
