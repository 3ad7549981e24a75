"""The share of a card that a job's processes may use, passed on in an environment variable. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping

# The share of its card's memory that a process and its children may use; absent or empty: all of it.
SHARE = "QUANTMILL_CARD_SHARE"


def share_of(environment: Mapping[str, str] = os.environ) -> float:
    """The share in an environment: above 0, at most 1; 0 if nothing is left."""
    return min(1.0, max(0.0, float(environment.get(SHARE) or 1.0)))


def left(taken: float) -> dict[str, str]:
    """This process's environment for a child that may use what this process, which has taken so much, leaves."""
    return {**os.environ, SHARE: f"{max(0.0, share_of() - taken):.6f}"}
