"""Model families that quantmill refuses, with the reason: causal LMs of transformers that the walk found wanting.

tests/walk takes the smallest model of every family all the way, and fails if one of these got there after all.
"""

from __future__ import annotations

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

REASONS: dict[str, str] = {
    "bailing_hybrid": _FUSED_CONVOLUTIONS,
    "dots3_note": _HEADS,
    "dots3_note_text": _HEADS,
    "emu3": _TEXT_PART,
    "gemma3n": "its class needs the package timm, for images; gemma3n_text, the text model alone, is supported",
    "gemma4_assistant": _OTHER_MODEL,
    "gemma4_unified_assistant": _OTHER_MODEL,
    "hrm_text": "its forward runs the same layers several times",
    "kimi_linear": _FUSED_CONVOLUTIONS,
    "llama4": _SPLIT_EXPERTS,
    "llama4_text": _SPLIT_EXPERTS,
    "mllama": _TEXT_PART,
    "musicgen": _COMPOSITE,
    "musicgen_melody": _COMPOSITE,
    "olmo_hybrid": _FUSED_CONVOLUTIONS,
    "prophetnet": "its forward predicts several tokens at once, from streams of its own",
    "zamba": _SHARED_BLOCK,
    "zamba2": _SHARED_BLOCK,
}


def why_unsupported(model_type: str) -> str | None:
    """Why a family, by the ``model_type`` of its config.json, can't be quantized; None if it can, or isn't known."""
    return REASONS.get(model_type)
