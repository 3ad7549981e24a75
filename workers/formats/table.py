"""The table of codecs: for each row of ``spec.formats`` the functions that encode, configure and open a checkpoint.

Its keys are exactly those of ``spec.formats.FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from workers.checkpoint.source import Source
from workers.errors import UnsupportedRecipe
from workers.formats import awq, fp8, gguf, gptq, mlx
from workers.formats.compressed_tensors import module as compressed_tensors
from workers.formats.decoder import NO_NAMES, Decoder
from workers.numerics.codes import CodedWeight
from workers.spec import formats as rows
from workers.spec import plugins
from workers.spec.schemes import LinearScheme


class Encode(Protocol):
    """Encodes one module's codes as stored tensors."""

    def __call__(self, weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
        """The stored tensors by their names within the module."""


class Configure(Protocol):
    """Builds the description of a checkpoint for its config.json."""

    def __call__(
        self,
        schemes: Mapping[str, LinearScheme],
        unquantized: Iterable[str],
        conv1d: Iterable[str] = (),
        runtimes: Iterable[str] = (),
        in_model: Mapping[str, str] = NO_NAMES,
        speculative: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The ``quantization_config``.

        ``schemes`` is each quantized module's scheme, fallbacks included; ``unquantized`` are the other Linear modules
        (where a module and its checkpoint key differ in name, both names); ``conv1d`` are those of ``schemes`` that are
        transformers' Conv1D; ``runtimes`` are those that a zoo names to check the artifact, none: the format's own;
        ``in_model`` has the names in the model of those of ``schemes`` whose names in the checkpoint differ;
        ``speculative`` are those of ``unquantized`` in blocks that transformers doesn't build.

        Raises:
            UnsupportedRecipe: modules that the format, or the runtime that checks it, doesn't support.
        """


@dataclass(frozen=True)
class Codec:
    """Writes and reads one format.

    ``open`` takes the ``quantization_config``, the checkpoint, and whether its own code may be run. Formats written
    only by a library have neither ``encode`` nor ``config``: their engine calls the library.
    """

    open: Callable[[Mapping[str, Any], Any, bool], Decoder]
    encode: Encode | None = None
    config: Configure | None = None


def _open_bitsandbytes(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    from workers.formats import bitsandbytes  # importing the library takes seconds

    return bitsandbytes.open_(config, source, trust_remote_code)


def _not_decoded(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    able = sorted(row.name for row in rows.FORMATS.values() if row.decoded)
    raise UnsupportedRecipe(
        f"checkpoint {source.folder}: quant_method {config.get('quant_method')!r} in config.json; can decode "
        f"{', '.join(able)}"
    )


CODECS: dict[str, Codec] = {
    rows.COMPRESSED_TENSORS.name: Codec(
        compressed_tensors.open_, compressed_tensors.encode, compressed_tensors.quantization_config
    ),
    rows.GPTQ.name: Codec(gptq.open_, gptq.V1.encode, gptq.V1.quantization_config),
    rows.GPTQ_V2.name: Codec(gptq.open_, gptq.V2.encode, gptq.V2.quantization_config),
    rows.AWQ.name: Codec(awq.open_, awq.encode, awq.quantization_config),
    rows.FP8.name: Codec(fp8.open_, fp8.encode, fp8.quantization_config),
    rows.BITSANDBYTES.name: Codec(_open_bitsandbytes),
    rows.GGUF.name: Codec(gguf.open_),
    rows.MLX.name: Codec(mlx.open_, mlx.encode, mlx.quantization_config),
    rows.HF_QUANTIZER.name: Codec(_not_decoded),
}
CODECS |= {name: plugins.resolved(where) for name, where in plugins.CODECS.items()}
