"""Whether transformers computes the format fp8 with its own kernels here; if not, it can decode the weights on loading.

Its kernels round the activations to FP8, what it decodes doesn't: who measures an artifact has to know which of both.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

# transformers 5.23: FineGrainedFP8HfQuantizer.validate_environment, and utils.import_utils.KERNELS_*_VERSION.
CAPABILITY = (8, 9)
PACKAGE, LEAST, BELOW = "kernels", Version("0.18.2"), Version("0.19.0")


def lacking(capability: tuple[int, int] | None) -> str:
    """Why the kernels can't run on a card of this compute capability (None: no card); empty if they can."""
    return _lacking(capability, _installed())


def _lacking(capability: tuple[int, int] | None, installed: str | None) -> str:
    if capability is None:
        return "there is no GPU"
    if capability < CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))}, expected 8.9 or more"
    if installed is None:
        return f"package {PACKAGE} is not installed; pip install '{PACKAGE}>={LEAST},<{BELOW}'"
    if not LEAST <= Version(installed) < BELOW:
        return f"package {PACKAGE}: got {installed}; pip install '{PACKAGE}>={LEAST},<{BELOW}'"
    return ""


def _installed() -> str | None:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
