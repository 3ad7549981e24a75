"""The codecs: for each row of ``spec.formats`` what writes its tensors and config.json, and what opens a checkpoint.

Every name here is one of ``spec.formats.FORMATS``, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from workers.checkpoint.source import Source
from workers.formats import awq, fp8, gptq
from workers.formats.compressed_tensors import module as compressed_tensors
from workers.formats.decoder import Decoder
from workers.numerics.codes import CodedWeight
from workers.spec import formats as rows
from workers.spec.schemes import LinearScheme


class Encode(Protocol):
    """What stores the codes of one module."""

    def __call__(self, weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
        """The stored tensors by their names within the module."""


class Configure(Protocol):
    """What describes a checkpoint in its config.json."""

    def __call__(
        self, schemes: Mapping[str, LinearScheme], kept: Iterable[str], conv1d: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config``.

        ``schemes`` is what each quantized module got, fallbacks included; ``kept`` are the Linear modules left as they
        are (where a module and its checkpoint key differ in name, both names); ``conv1d`` are those of ``schemes`` that
        are transformers' Conv1D.

        Raises:
            UnsupportedRecipe: modules that the format, or the runtime that checks it, doesn't take.
        """


@dataclass(frozen=True)
class Codec:
    """How one format is written and read.

    ``open`` gets the ``quantization_config``, the checkpoint, and whether its own code may be run. Formats that a
    library alone writes have neither ``encode`` nor ``config``: their engine calls the library.
    """

    open: Callable[[Mapping[str, Any], Source, bool], Decoder]
    encode: Encode | None = None
    config: Configure | None = None


def _open_bitsandbytes(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    from workers.formats import bitsandbytes  # importing the library takes seconds

    return bitsandbytes.open_(config, source, trust_remote_code)


CODECS: dict[str, Codec] = {
    rows.COMPRESSED_TENSORS.name: Codec(
        compressed_tensors.open_, compressed_tensors.encode, compressed_tensors.quantization_config
    ),
    rows.GPTQ.name: Codec(gptq.open_, gptq.V1.encode, gptq.V1.quantization_config),
    rows.GPTQ_V2.name: Codec(gptq.open_, gptq.V2.encode, gptq.V2.quantization_config),
    rows.AWQ.name: Codec(awq.open_, awq.encode, awq.quantization_config),
    rows.FP8.name: Codec(fp8.open_, fp8.encode, fp8.quantization_config),
    rows.BITSANDBYTES.name: Codec(_open_bitsandbytes),
}
