"""How one opened checkpoint is decoded: what each format's codec makes of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from workers.checkpoint.source import Header


@dataclass(frozen=True)
class Decoder:
    """How the checkpoint's quantized weights are read; the functions get a module's name first.

    A module is quantized if one of ``anchors`` stands in the checkpoint under its name; the tensors of its weight are
    those of ``suffixes``, of which it has all that are ``required``. ``header`` gives shape and dtype of what
    ``decode`` returns; ``rounding`` also gets the kind of device, and says what the runtime does to the module's
    input.
    """

    anchors: tuple[str, ...]
    suffixes: tuple[str, ...]
    required: tuple[str, ...]
    header: Callable[[str, Mapping[str, Header], Callable[[str], Tensor]], Header]
    decode: Callable[[str, Mapping[str, Tensor]], Tensor]
    rounding: Callable[[str, Mapping[str, Tensor], str], Callable[[Tensor], Tensor] | None] = lambda *_: None
