"""Which formats take which layers of a model, as far as it is known before anything is loaded: for plan and worker.

What transformers 5.23 loads wrongly, or not at all, is refused.
"""

from __future__ import annotations

import re

from workers.recipes import FORMAT_HOLDS, Float8Scheme, IntScheme, MicroscalingScheme, Scheme, format_holds

# A weight of one expert; transformers fuses them into one tensor for each layer while it loads.
EXPERT = re.compile(r"\.experts\.\d+\.")
# Their linear layers are Conv1D, stored (in, out).
CONV1D_MODEL_TYPES = frozenset({"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"})

WITHOUT_EXPERTS = ("gptq", "gptq-v2", "awq")


def conv1d_misfit(fmt: str) -> str | None:
    """Why Conv1D layers can't be stored in a format; None if they can."""
    if fmt == "bitsandbytes":
        return None
    return "are Conv1D, which transformers doesn't load in this format; choose method: bitsandbytes"


def experts_misfit(fmt: str, scheme: Scheme) -> str | None:
    """Why experts can't be stored in a format under a scheme, and what to do; None if they can."""
    ways = f"ignore them ('*.experts.*'), or choose {_alternatives(scheme)}"
    match fmt, scheme:
        case _ if fmt in WITHOUT_EXPERTS:
            return f"are experts, which transformers loads wrongly in this format; {ways}"
        case "compressed-tensors", IntScheme(activations="int8"):
            return (
                "are experts, which transformers can't load with activations: int8 (torch.cat(): expected a non-empty "
                "list); choose activations: none"
            )
        case "compressed-tensors", Float8Scheme(activations="static"):
            return (
                "are experts, and transformers doesn't know the static scales of experts' inputs (unexpected keys); "
                "choose activations: dynamic or none"
            )
        case "compressed-tensors", MicroscalingScheme(type="nvfp4"):
            return (
                "are experts, of which transformers drops the global scale and computes with wrong weights, without an "
                "error; choose type: mxfp4"
            )
    return None


def _alternatives(scheme: Scheme) -> str:
    """The formats that take experts under a scheme, or what else to change."""
    symmetric = scheme.model_copy(update={"symmetric": True}) if isinstance(scheme, IntScheme) else scheme
    change = "" if symmetric == scheme else " with symmetric: true"
    fits = [fmt for fmt in FORMAT_HOLDS if format_holds(fmt, symmetric) and fmt not in WITHOUT_EXPERTS]
    return f"format: {' or '.join(fits)}{change}" if fits else "another scheme"
