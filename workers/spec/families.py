"""The table of model families with special handling, by the ``model_type`` of config.json.

Refused families are causal LMs of transformers that failed the walk: tests/walk runs the smallest model of every family
through all stages, and fails if a refused family passes.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_LOADER = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Family:
    """One model family.

    ``refused`` is the reason why it can't be quantized. ``loader`` is the class of transformers that builds it, and
    ``text_prefix`` the module that holds its text part, empty if that is the whole model. ``conv1d``: its linear layers
    are Conv1D, stored (in, out).
    """

    refused: str | None = None
    loader: str = DEFAULT_LOADER
    text_prefix: str = ""
    conv1d: bool = False


_FUSED_CONVOLUTIONS = "transformers 5.23 fails to fuse its convolutions when a quantized checkpoint of it is loaded"
_TEXT_PART = "AutoModelForCausalLM builds its text part alone, and saves it with a config that it doesn't take back"
_SHARED_BLOCK = "its layers share the weights of one attention block, and a layer can't be quantized alone"
_SPLIT_EXPERTS = (
    "transformers splits its experts into linear layers when a quantized checkpoint is loaded, which its own "
    "checkpoints hold as one tensor"
)
_OTHER_MODEL = "it drafts on the keys and values of another model; transformers 5.23 builds no model of it alone"
_HEADS = "the number of its heads differs by layer, and quantmill can't tell how much memory its layers take"
_COMPOSITE = "AutoModelForCausalLM can't be built of its composite config"

FAMILIES: dict[str, Family] = {
    "bailing_hybrid": Family(refused=_FUSED_CONVOLUTIONS),
    "dots3_note": Family(refused=_HEADS),
    "dots3_note_text": Family(refused=_HEADS),
    "emu3": Family(refused=_TEXT_PART),
    "gemma3n": Family(
        refused="its class needs the package timm, for images; gemma3n_text, the text model alone, is supported"
    ),
    "gemma4_assistant": Family(refused=_OTHER_MODEL),
    "gemma4_unified_assistant": Family(refused=_OTHER_MODEL),
    "hrm_text": Family(refused="its forward runs the same layers several times"),
    "kimi_linear": Family(refused=_FUSED_CONVOLUTIONS),
    "llama4": Family(refused=_SPLIT_EXPERTS),
    "llama4_text": Family(refused=_SPLIT_EXPERTS),
    "mllama": Family(refused=_TEXT_PART),
    "musicgen": Family(refused=_COMPOSITE),
    "musicgen_melody": Family(refused=_COMPOSITE),
    "olmo_hybrid": Family(refused=_FUSED_CONVOLUTIONS),
    "prophetnet": Family(refused="its forward predicts several tokens at once, from streams of its own"),
    "zamba": Family(refused=_SHARED_BLOCK),
    "zamba2": Family(refused=_SHARED_BLOCK),
    "gpt2": Family(conv1d=True),
    "gpt-sw3": Family(conv1d=True),
    "openai-gpt": Family(conv1d=True),
    "imagegpt": Family(conv1d=True),
    "decision_transformer": Family(conv1d=True),
}


def family_of(model_type: object) -> Family:
    """The row of a family; the default row for families without one."""
    known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return known or Family()
