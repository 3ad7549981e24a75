"""The engines: one row each of what makes artifacts. Those that take part in the pass are in ``engines.table``.

An engine of the second kind makes a whole artifact in a process of its own (``engines.whole``): ``script`` is a module
that reads a ``WholeRequest`` as JSON from its standard input and writes ``WholeProgress`` lines as JSON to its standard
output, in the prebuilt ``environment``, if it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from workers.spec.base import Frozen
from workers.spec.layers import Layout
from workers.spec.recipes import Recipe


@dataclass(frozen=True)
class Engine:
    """What is known of one engine: the distributions that it takes, and the least compute capability of a card."""

    name: str
    packages: tuple[str, ...] = ()
    least_capability: tuple[int, int] = (0, 0)
    script: str | None = None
    environment: str | None = None


class WholeRequest(Frozen):
    """What a whole-artifact engine is told: make ``recipe`` of the checkpoint in ``source``, into the empty ``out``."""

    source: str
    out: str
    recipe: Recipe
    calibration: str | None = Field(None, description="safetensors with ``tokens`` int64 [N, T]; null: no calibration.")
    trust_remote_code: bool = False


class WholeProgress(Frozen):
    """One line of a whole-artifact engine's answer; the last one has ``layout``, or ``error``."""

    share: float = Field(0.0, ge=0, le=1, description="How much of the work is done.")
    layout: Layout | None = None
    fallbacks: tuple[str, ...] = ()
    error: str | None = None


LINEAR = Engine("linear")
BITSANDBYTES = Engine("bitsandbytes", packages=("bitsandbytes",), least_capability=(6, 0))

ENGINES: dict[str, Engine] = {row.name: row for row in (LINEAR, BITSANDBYTES)}
