"""What to do about the errors that quantization libraries raise most: their words, and the remedy.

The preflight says beforehand what can be known beforehand (``machine.preflight``); these are for what a library says
once it runs, on whatever machine. ``machine.failures`` puts the remedy after the library's message.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Remedy(NamedTuple):
    """A library's words, as a pattern, and what to do."""

    words: re.Pattern[str]
    remedy: str


def _row(words: str, remedy: str) -> Remedy:
    return Remedy(re.compile(words, re.IGNORECASE), remedy)


# The first that fits: what is more particular stands before what is less.
REMEDIES: dict[str, Remedy] = {
    "bitsandbytes missing": _row(
        r"requires bitsandbytes|No module named 'bitsandbytes'", "pip install -U bitsandbytes on every node"
    ),
    "accelerate missing or too old": _row(
        r"requires accelerate|No module named 'accelerate'|accelerate`? version|accelerate>=",
        "pip install -U accelerate on every node",
    ),
    "CPU offload not enabled": _row(
        r"dispatched on the CPU or the disk|enable_fp32_cpu_offload",
        "use a larger card, or set options: {fp32_cpu_offload: true} in the recipe, which keeps those in float32",
    ),
    "unknown quantization type": _row(
        r"Unknown quantization type|no `quant_method` attribute",
        "update transformers, or name a checkpoint in a format that it knows",
    ),
    "extension for another CUDA": _row(
        r"CUDA Setup failed|libbitsandbytes_cuda\w*\.so|undefined symbol|no kernel image is available"
        r"|CUDA extension not installed|cannot open shared object file.*cuda",
        "install the library's build for torch's CUDA version (python -c 'import torch; print(torch.version.cuda)'): "
        "pip install -U --force-reinstall it, or build an environment with quantmill env create",
    ),
    "no CUDA": _row(
        r"Torch not compiled with CUDA|No CUDA GPUs are available|Found no NVIDIA driver|CUDA is not available"
        r"|No GPU found",
        "run it on a node with a GPU and torch's CUDA build, or choose a recipe that quantmill doctor shows as ready",
    ),
    "out of memory": _row(
        r"out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "use a larger card, lower calibration.samples, or shorter sequence_length; quantization's buffers need a tenth "
        "of the memory beside the model",
    ),
    "dtypes differ": _row(
        r"expected scalar type|expected m1 and m2 to have the same dtype|mat1 and mat2 must have the same dtype",
        "load it in the dtype of config.json (dtype='auto'), or set options: {compute_dtype: float16} for bitsandbytes",
    ),
    "capability too low": _row(
        r"compute capability|sm_?\d\d is not (supported|compatible)|not supported on this (gpu|architecture)",
        "use a newer card, or a recipe with less demands: FP8 kernels need 8.9, bfloat16 8.0, bitsandbytes 6.0",
    ),
}


def kind_of(message: str) -> str | None:
    """The name of the row whose words are in a message; None if it is in none."""
    return next((kind for kind, row in REMEDIES.items() if row.words.search(message)), None)


def with_remedy(message: str) -> str:
    """A library's message with what to do about it; unchanged if that isn't known."""
    kind = kind_of(message)
    return message if kind is None else f"{message}; {kind}: {REMEDIES[kind].remedy}"
