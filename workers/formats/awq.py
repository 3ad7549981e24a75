"""The awq format (AutoAWQ's GEMM version), as transformers, gptqmodel and vLLM read it.

Shapes: O output features, I input features, G groups of input columns. Codes are unsigned, stored with inputs first,
eight outputs to a word in the order 0, 2, 4, 6, 1, 3, 5, 7. Specification: ``gptqmodel.quantization.awq`` (7.6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import NumericalError, UnsupportedRecipe
from workers.formats.decoder import NO_NAMES, Decoder
from workers.formats.gptq import one_block, one_scheme
from workers.numerics.codes import CodedWeight, IntWeight
from workers.numerics.packing import pack, unpack
from workers.spec.formats import AWQ, others_that_hold
from workers.spec.schemes import LinearScheme

ANCHORS = ("qweight",)
SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4
IN_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def encode(weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``qweight`` int32 (I, O / 8); ``qzeros`` int32 (G, O / 8); ``scales`` float16 (G, O).

    Raises:
        UnsupportedRecipe: 8 doesn't divide O.
        NumericalError: a scale exceeds float16's range.
    """
    assert isinstance(weight, IntWeight), "the recipe refuses other schemes"
    assert weight.zero_OG is not None, "the recipe refuses symmetric schemes"
    rows = len(weight.codes_OI)
    if rows % IN_WORD:
        raise UnsupportedRecipe(
            f"awq: a weight of {rows} outputs can't be packed, {IN_WORD} must divide them; ignore that layer, or "
            f"choose {others_that_hold(AWQ.name, scheme)}"
        )
    scale_GO = weight.scale_OG.t().to(torch.float16).contiguous()
    if not scale_GO.isfinite().all():
        raise NumericalError(f"awq: a scale of {weight.scale_OG.abs().max().item()} is too large for float16")
    middle = 1 << (BITS - 1)
    return {
        "qweight": _packed(weight.codes_OI.t().int() + middle),
        "qzeros": _packed(weight.zero_OG.t().int() + middle),
        "scales": scale_GO,
    }


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), float16 as in gptqmodel's reference kernel."""
    codes_IO, zero_GO = _unpacked(stored["qweight"]), _unpacked(stored["qzeros"])
    size = len(codes_IO) // len(zero_GO)
    steps_GgO = torch.unflatten(codes_IO, 0, (-1, size)) - zero_GO[:, None]
    weight_IO = (steps_GgO.to(torch.float16) * stored["scales"][:, None]).flatten(0, 1)
    return weight_IO.t().contiguous()


def codes(stored: Mapping[str, Tensor]) -> IntWeight:
    """The codes of one module; zero points that are all in the middle are those of a symmetric scheme."""
    middle, scale_GO = 1 << (BITS - 1), stored["scales"]
    codes_OI = (_unpacked(stored["qweight"]).t() - middle).to(torch.int8).contiguous()
    zero_OG = (_unpacked(stored["qzeros"]).t() - middle).to(torch.int8).contiguous()
    group_size = None if len(scale_GO) == 1 else codes_OI.shape[1] // len(scale_GO)
    return IntWeight(codes_OI, scale_GO.t().contiguous(), zero_OG if zero_OG.any() else None, BITS, group_size)


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of :func:`decode`'s result."""
    width, words = stored["qweight"].shape
    return Header((words * IN_WORD, width), torch.float16)


def check_declared(config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` of another version or bit width.

    Raises:
        UnsupportedRecipe: names the declared version and width.
    """
    version, bits = str(config.get("version") or config.get("format") or "gemm").lower(), config.get("bits")
    if version != "gemm" or bits != BITS:
        raise UnsupportedRecipe(
            f"awq: version {version!r} with {bits} bits can't be decoded; only 'gemm' with {BITS} bits is known"
        )


def quantization_config(
    schemes: Mapping[str, LinearScheme],
    unquantized: Iterable[str],
    conv1d: Iterable[str] = (),
    runtimes: Iterable[str] = (),
    in_model: Mapping[str, str] = NO_NAMES,
    speculative: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json; arguments as in ``formats.gptq``.

    Raises:
        UnsupportedRecipe: there are Conv1D modules, quantized experts, modules outside of the decoder layers or with
            different schemes, or no kernel reads the group size.
    """
    scheme = one_scheme(AWQ.name, schemes)
    one_block(AWQ.name, schemes, conv1d, runtimes)
    return {
        "bits": BITS,
        "group_size": scheme.group_size,
        "modules_to_not_convert": sorted(set(unquantized)),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def _packed(values_XO: Tensor) -> Tensor:
    ordered = torch.unflatten(values_XO, 1, (-1, IN_WORD))[..., list(ORDER)].flatten(1)
    return pack(ordered, BITS)


def _unpacked(words_XW: Tensor) -> Tensor:
    values = torch.unflatten(unpack(words_XW, BITS, words_XW.shape[1] * IN_WORD), 1, (-1, IN_WORD))
    return values[..., [ORDER.index(position) for position in range(IN_WORD)]].flatten(1)


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``.

    Raises:
        UnsupportedRecipe: see ``check_declared``.
    """
    check_declared(config)
    return Decoder(
        anchors=ANCHORS,
        suffixes=SUFFIXES,
        required=SUFFIXES,
        header=lambda module, headers, read: header(headers),
        decode=lambda module, stored: decode(stored),
        codes=lambda module, stored: codes(stored),
    )
