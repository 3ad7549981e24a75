"""The decoder of one opened checkpoint, built by a format's codec from its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from workers.checkpoint.source import Header, TensorSource
from workers.numerics.codes import CodedWeight

NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Decoder:
    """Reads the checkpoint's quantized weights; the functions take a module's name first.

    A module is quantized if the checkpoint has a tensor named by it and one of ``anchors``; its weight's tensors are
    those named by ``suffixes``, of which all ``required`` must exist. ``header`` returns shape and dtype of the result
    of ``decode``; ``rounding`` also takes the kind of device, and returns how the runtime rounds the module's input.
    ``codes`` returns a module's codes as stored, for formats of which they can be kept (``spec.kept``, and
    ``formats.already``); None for codes of a kind that no recipe makes.
    ``facts`` are those of ``suffixes`` that ``decode`` reads numbers from: they stay on the CPU, wherever it computes.
    With ``cache_scales``, attention modules have scales of their keys and values. ``view`` is the checkpoint under the
    names of the one that was quantized, if it's stored under others.
    """

    anchors: tuple[str, ...]
    suffixes: tuple[str, ...]
    required: tuple[str, ...]
    header: Callable[[str, Mapping[str, Header], Callable[[str], Tensor]], Header]
    decode: Callable[[str, Mapping[str, Tensor]], Tensor]
    activation_scales: tuple[str, ...] = ()
    rounding: Callable[[str, Mapping[str, Tensor], str], Callable[[Tensor], Tensor] | None] = lambda *_: None
    facts: tuple[str, ...] = ()
    cache_scales: bool = False
    view: TensorSource | None = None
    codes: Callable[[str, Mapping[str, Tensor]], CodedWeight | None] | None = None
