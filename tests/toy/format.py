"""The toy format: int8 codes under ``toy_codes``, and a scale for each output under ``toy_scale``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.formats.decoder import NO_NAMES, Decoder
from workers.formats.table import Codec
from workers.numerics.codes import CodedWeight, IntWeight
from workers.spec.formats import Format
from workers.spec.schemes import IntScheme, LinearScheme, Scheme
from workers.spec.tensors import TensorHeader

NAMES = ("toy_codes", "toy_scale")


def _stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    rows, columns = weight.shape
    return [TensorHeader("toy_codes", (rows, columns), "I8"), TensorHeader("toy_scale", (rows, 1), weight.dtype)]


ROW = Format(
    name="toy",
    says="symmetric int of 8 bits, one scale for each output",
    holds=lambda scheme: (
        isinstance(scheme, IntScheme)
        and (scheme.bits, scheme.group_size, scheme.symmetric, scheme.activations) == (8, None, True, "none")
    ),
    stored=_stored,
    declares=lambda config: config.get("quant_method") == "toy",
    family=lambda config: ["w8"],
)


def encode(weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
    """``toy_codes`` int8 (O, I); ``toy_scale`` (O, 1) in the checkpoint's dtype."""
    assert isinstance(weight, IntWeight)
    return {"toy_codes": weight.codes_OI.contiguous(), "toy_scale": weight.scale_OG.contiguous()}


def config(
    schemes: Mapping[str, LinearScheme],
    unquantized: Iterable[str],
    conv1d: Iterable[str] = (),
    runtimes: Iterable[str] = (),
    in_model: Mapping[str, str] = NO_NAMES,
    speculative: Iterable[str] = (),
) -> dict[str, Any]:
    """Only the name: every linear layer of a decoder layer is quantized, or says so by its tensors."""
    return {"quant_method": "toy"}


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight (O, I), in the dtype of the scales."""
    return stored["toy_codes"].to(stored["toy_scale"].dtype) * stored["toy_scale"]


def open_(declared: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """What decodes a toy checkpoint."""
    return Decoder(
        anchors=("toy_codes",),
        suffixes=NAMES,
        required=NAMES,
        header=lambda module, headers, read: Header(headers["toy_codes"].shape, headers["toy_scale"].dtype),
        decode=lambda module, stored: decode(stored),
    )


CODEC = Codec(open_, encode, config)
