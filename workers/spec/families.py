"""The table of model families with special handling, by the ``model_type`` of config.json.

Refused families are causal or multimodal LMs of transformers that failed the walk: tests/walk runs the smallest model
of every family through all stages, and fails if a refused family passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_LOADER = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Family:
    """One model family.

    ``refused`` is the reason why it can't be quantized, ``refused_alone`` the one why its text part alone can't, which
    AutoModelForCausalLM builds, and ``refused_whole`` the one why the multimodal model can't. ``split`` and ``joined``
    (of the multimodal model alone: ``joined_whole``): its checkpoints hold tensors that transformers splits into, or
    joins to, what its modules have, and of which it loses those that have no codes where it loads compressed-tensors.
    ``package`` is one that its class imports beside transformers. ``loader`` is the class of transformers that builds
    it, and ``text_prefix`` the module that holds its text part, empty if that is the whole model; ``forward`` names the
    one whose forward is the language model's, where its class has none. ``conv1d``: its linear layers are Conv1D,
    stored (in, out). ``split_experts``: its own checkpoints hold a layer's experts in two tensors, of which
    transformers makes linear layers where a checkpoint is quantized.
    """

    refused: str | None = None
    refused_alone: str | None = None
    refused_whole: str | None = None
    split: bool = False
    joined: bool = False
    joined_whole: bool = False
    package: str | None = None
    loader: str = DEFAULT_LOADER
    text_prefix: str = ""
    forward: str = ""
    conv1d: bool = False
    split_experts: bool = False


_TEXT_PART = "AutoModelForCausalLM builds its text part alone, and saves it with a config that it doesn't take back"
_OTHER_MODEL = "it drafts on the keys and values of another model; transformers 5.23 builds no model of it alone"
_COMPOSITE = "AutoModelForCausalLM can't be built of its composite config"

_NEEDS_A_PICTURE = "its forward needs a picture, and is calibrated and measured on text"
_ENCODER = "its decoder reads what an encoder of pictures or of another text hands it"

FAMILIES: dict[str, Family] = {
    "bailing_hybrid": Family(joined=True),
    "blip": Family(refused=_NEEDS_A_PICTURE),
    "blip-2": Family(refused=_NEEDS_A_PICTURE),
    "diffusion_gemma": Family(refused="it writes a block of tokens at once, by diffusion, not one after the other"),
    "dots3_note": Family(joined_whole=True),
    "emu3": Family(refused_alone=_TEXT_PART),
    "ernie4_5_vl_moe": Family(
        refused="its checkpoints hold the experts for text and those for pictures in one series, of two tensors"
    ),
    "evolla": Family(refused="transformers 5.23 lists it as a multimodal model, but builds none of its config"),
    "fast_vlm": Family(package="timm"),
    "florence2": Family(refused=_ENCODER),
    "gemma3n": Family(package="timm"),
    "gemma4_assistant": Family(refused=_OTHER_MODEL),
    "gemma4_unified_assistant": Family(refused=_OTHER_MODEL),
    "glm5_next": Family(joined=True),
    "hrm_text": Family(refused="its forward runs the same layers several times"),
    "idefics": Family(refused=_NEEDS_A_PICTURE),
    "inkling_mm_model": Family(split=True, package="scipy"),
    "instructblip": Family(refused=_NEEDS_A_PICTURE),
    "instructblipvideo": Family(refused=_NEEDS_A_PICTURE),
    "kimi_linear": Family(joined=True),
    "kosmos-2": Family(refused=_NEEDS_A_PICTURE),
    "kosmos-2.5": Family(refused=_NEEDS_A_PICTURE),
    "kyutai_speech_to_text": Family(refused="it reads codes of sound beside each token of text"),
    "llama4": Family(split_experts=True),
    "llama4_text": Family(split_experts=True),
    "minimax_m3_vl": Family(joined=True),
    "mllama": Family(refused_alone=_TEXT_PART),
    "molmo2": Family(split=True),
    "musicgen": Family(refused=_COMPOSITE),
    "musicgen_melody": Family(refused=_COMPOSITE),
    "nemo_speechlm": Family(refused="transformers 5.23 doesn't load what it saves of it: sizes differ"),
    "olmo_hybrid": Family(joined=True),
    "perception_lm": Family(package="timm"),
    "step3p7": Family(joined=True),
    "pi0": Family(refused="it moves a robot: its forward needs the state of one"),
    "pix2struct": Family(refused=_ENCODER),
    "pp_formulanet": Family(refused=_ENCODER),
    "prophetnet": Family(refused="its forward predicts several tokens at once, from streams of its own"),
    "qianfan_ocr": Family(split=True),
    "qwen2_5_omni": Family(
        refused="its class loads speakers from a pickled file; its thinker, a model_type of its own, is supported"
    ),
    "qwen3_omni_moe": Family(forward="thinker"),
    "shieldgemma2": Family(refused="it classifies pictures by a model that transformers 5.23 saves under other names"),
    "t5gemma2": Family(refused=_ENCODER),
    "udop": Family(refused=_ENCODER),
    "vision-encoder-decoder": Family(refused=_ENCODER),
    "voxtral_realtime": Family(refused="its forward needs a stream of sound"),
    "gpt2": Family(conv1d=True),
    "gpt-sw3": Family(conv1d=True),
    "openai-gpt": Family(conv1d=True),
    "imagegpt": Family(conv1d=True),
    "decision_transformer": Family(conv1d=True),
}


def forward_of(model: Any) -> Any:
    """The module of a whole model of transformers whose forward takes token ids: the model, but for a few families."""
    name = family_of(model.config.model_type).forward
    return model.get_submodule(name) if name else model


def family_of(model_type: object) -> Family:
    """The row of a family; the default row for families without one."""
    known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return known or Family()
