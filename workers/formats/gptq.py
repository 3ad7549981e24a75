"""The gptq format, in both existing versions, as transformers, gptqmodel and vLLM read it.

Shapes: O output features, I input features, G groups of input columns. Codes are unsigned, stored with inputs first.
Specification: ``gptqmodel.nn_modules.qlinear`` (7.6). The first version (AutoGPTQ's, ``checkpoint_format: gptq``)
stores zero points minus one; the second (``gptq_v2``) stores them unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import NumericalError, UnsupportedRecipe
from workers.formats.compressed_tensors.module import check_words, some
from workers.formats.decoder import NO_NAMES, Decoder
from workers.numerics.codes import CodedWeight, IntWeight
from workers.numerics.packing import pack_gptq, unpack_gptq
from workers.spec.formats import (
    FORMATS,
    GPTQ,
    GPTQ_V2,
    formats_with_schemes_by_layer,
    group_size_held,
    others_that_hold,
)
from workers.spec.layers import EXPERT, LayerKinds
from workers.spec.runtimes import misfit
from workers.spec.schemes import IntScheme, LinearScheme

ANCHORS = ("qweight",)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Version:
    """One version of the format: its name in config.json, and the offset subtracted from stored zero points."""

    name: str
    offset: int

    def encode(self, weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
        """Return the stored tensors by their names within the module.

        ``qweight`` int32 (I * bits / 32, O); ``qzeros`` int32 (G, O * bits / 32); ``scales`` float16 (G, O); ``g_idx``
        int32 (I,), in order of the columns.

        Raises:
            UnsupportedRecipe: 32 doesn't divide both O and I.
            NumericalError: a scale exceeds float16's range, or, in the first version, a group has its zero point at the
                lowest code and also uses the highest.
        """
        assert isinstance(weight, IntWeight), "the recipe refuses other schemes"
        rows, columns = weight.codes_OI.shape
        if rows % 32 or columns % 32:
            raise UnsupportedRecipe(
                f"gptq: a weight of {rows} x {columns} can't be packed, 32 must divide both; ignore that layer, or "
                f"choose {others_that_hold(GPTQ.name, scheme)}"
            )
        scale_GO = weight.scale_OG.t().to(torch.float16).contiguous()
        if not scale_GO.isfinite().all():
            raise NumericalError(f"gptq: a scale of {weight.scale_OG.abs().max().item()} is too large for float16")
        codes_OI, zero_OG = _unsigned(weight, self.offset)
        return {
            "qweight": pack_gptq(codes_OI.t(), weight.bits, 0),
            "qzeros": pack_gptq(zero_OG.t() - self.offset, weight.bits, 1),
            "scales": scale_GO,
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // scale_GO.shape[0]),
        }

    def decode(self, stored: Mapping[str, Tensor], bits: int) -> Tensor:
        """Decode the tensors of one module to its weight (O, I), float16 as in gptqmodel's reference kernel.

        Raises:
            CheckpointError: the number of words doesn't match ``bits``.
        """
        group_I = stored["g_idx"].long()
        check_words(stored["qweight"].shape[0], len(group_I), bits)
        codes_IO = unpack_gptq(stored["qweight"], bits, 0)
        # gptqmodel pads the last word if 32 doesn't divide the number of outputs.
        zero_GO = unpack_gptq(stored["qzeros"], bits, 1)[:, : stored["scales"].shape[1]] + self.offset
        weight_IO = (codes_IO - zero_GO[group_I]).to(torch.float16) * stored["scales"][group_I]
        return weight_IO.t().contiguous()

    def codes(self, stored: Mapping[str, Tensor], bits: int) -> IntWeight:
        """The codes of one module; zero points that are all in the middle are those of a symmetric scheme.

        Raises:
            UnsupportedRecipe: its groups aren't runs of columns, or a zero point isn't one of the codes.
        """
        group_I, scale_GO = stored["g_idx"].long(), stored["scales"]
        check_words(stored["qweight"].shape[0], len(group_I), bits)
        size, middle = len(group_I) // len(scale_GO), 1 << (bits - 1)
        if not torch.equal(group_I, torch.arange(len(group_I)) // size):
            raise UnsupportedRecipe(
                "gptq: its groups are in order of activation (g_idx), which no other format holds; name the original "
                "checkpoint"
            )
        zero_GO = unpack_gptq(stored["qzeros"], bits, 1)[:, : scale_GO.shape[1]] + self.offset
        if int(zero_GO.max()) >= 2 * middle:
            raise UnsupportedRecipe(
                f"gptq: a zero point of {int(zero_GO.max())}, above the highest code, which readers take for different "
                "ones; name the original checkpoint"
            )
        codes_OI = (unpack_gptq(stored["qweight"], bits, 0).t() - middle).to(torch.int8).contiguous()
        zero_OG = (zero_GO.t() - middle).to(torch.int8).contiguous()
        group_size = None if len(scale_GO) == 1 else size
        return IntWeight(codes_OI, scale_GO.t().contiguous(), zero_OG if zero_OG.any() else None, bits, group_size)

    def quantization_config(
        self,
        schemes: Mapping[str, LinearScheme],
        unquantized: Iterable[str],
        conv1d: Iterable[str] = (),
        runtimes: Iterable[str] = (),
        in_model: Mapping[str, str] = NO_NAMES,
        speculative: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of config.json.

        ``schemes`` is each quantized module's scheme, fallbacks included; ``unquantized`` are the other Linear modules;
        ``conv1d`` are those of ``schemes`` that are Conv1D; ``in_model`` has the names in the model, by which
        transformers finds them, of those whose names in the checkpoint differ.

        Raises:
            UnsupportedRecipe: there are Conv1D modules, quantized experts, modules outside of the decoder layers or
                with different schemes, or a scheme that gptqmodel computes wrongly.
        """
        schemes = {in_model.get(name, name): scheme for name, scheme in schemes.items()}
        scheme = one_scheme(GPTQ.name, schemes)
        blocks = one_block(GPTQ.name, schemes, conv1d, runtimes)
        inside = sorted({name for name in unquantized if _block(name) == blocks})
        return {
            "bits": scheme.bits,
            "block_name_to_quantize": blocks,
            "checkpoint_format": self.name,
            "desc_act": False,
            "group_size": scheme.group_size or -1,
            "lm_head": False,
            "quant_method": "gptq",
            "sym": scheme.symmetric,
            **(_exceptions(sorted(schemes), inside) if inside else {}),
        }


V1 = Version("gptq", 1)
V2 = Version("gptq_v2", 0)


def header(stored: Mapping[str, Header]) -> Header:
    """Return shape and dtype of the decoded weight."""
    return Header((stored["qweight"].shape[1], stored["g_idx"].shape[0]), torch.float16)


def declared(config: Mapping[str, Any]) -> tuple[Version, int]:
    """Return the version and the bit width declared by config.json's ``quantization_config``.

    Raises:
        UnsupportedRecipe: another version of the format.
    """
    version_name = config.get("checkpoint_format") or config.get("format") or "gptq"
    known = {version.name: version for version in (V1, V2)}
    if version_name not in known:
        raise UnsupportedRecipe(
            f"gptq: checkpoint_format {version_name!r} can't be decoded; known are {', '.join(known)}: quantize again "
            "to one"
        )
    return known[version_name], int(config["bits"])


def one_block(
    fmt: str, schemes: Mapping[str, LinearScheme], conv1d: Iterable[str], runtimes: Iterable[str] = ()
) -> str:
    """The list of layers that contains all quantized modules; ``gptq`` and ``awq`` support only one.

    Raises:
        UnsupportedRecipe: there are modules outside of it, Conv1D modules, or experts.
    """
    scheme, experts = one_scheme(fmt, schemes), [name for name in schemes if EXPERT.search(name)]
    if not group_size_held(FORMATS[fmt], scheme):
        raise UnsupportedRecipe(
            f"{fmt}: group_size {scheme.group_size} is read by no kernel; choose another, or "
            f"{others_that_hold(fmt, scheme)}"
        )
    _refuse(fmt, sorted(schemes), misfit(fmt, scheme, LayerKinds(), runtimes))
    _refuse(fmt, sorted(conv1d), misfit(fmt, scheme, LayerKinds(conv1d=True), runtimes))
    _refuse(fmt, experts, misfit(fmt, scheme, LayerKinds(experts=True), runtimes))
    blocks = Counter(_block(name) for name in schemes).most_common(1)[0][0]
    _refuse(
        fmt,
        [name for name in schemes if _block(name) != blocks],
        f"are outside of the decoder layers {blocks!r}, where nothing may be quantized in this format; ignore them, or "
        f"choose {formats_with_schemes_by_layer()}",
    )
    return blocks


def one_scheme(fmt: str, schemes: Mapping[str, LinearScheme]) -> IntScheme:
    """The scheme of all modules.

    Raises:
        UnsupportedRecipe: some modules have another scheme.
    """
    scheme = Counter(schemes.values()).most_common(1)[0][0]
    assert isinstance(scheme, IntScheme), "the recipe refuses other schemes"
    _refuse(
        fmt,
        [name for name, other in schemes.items() if other != scheme],
        f"deviate from the group size {scheme.group_size} of the others, and this format has one for all; choose "
        f"indivisible: keep, or {formats_with_schemes_by_layer()}",
    )
    return scheme


def _exceptions(quantized: list[str], unquantized: list[str]) -> dict[str, Any]:
    """The two settings that list the quantized modules: the first is transformers', the second gptqmodel's own."""
    return {
        "modules_in_block_to_quantize": [quantized],
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in unquantized},
    }


def _block(module: str) -> str:
    """The list of layers that a module belongs to: its name up to the first number."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[0]


def _unsigned(weight: IntWeight, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) in [0, 2^bits - 1] and zero points (O, G) in [lowest_zero, 2^bits - 1], int32.

    The first version would store a zero point of 0 as -1, which readers interpret differently: such groups are shifted
    up by one code, if the highest code is free.
    """
    middle = 1 << (weight.bits - 1)
    codes_OI = weight.codes_OI.int() + middle
    if weight.zero_OG is None:
        return codes_OI, torch.full_like(weight.scale_OG, middle, dtype=torch.int32)
    zero_OG = weight.zero_OG.int() + middle
    lift_OG = (zero_OG < lowest_zero).int()
    codes_OI = codes_OI + lift_OG.repeat_interleave(codes_OI.shape[1] // lift_OG.shape[1], dim=1)
    if codes_OI.max() >= 2 * middle:
        raise NumericalError(
            f"gptq: {int(lift_OG.sum())} groups without negative weights need the zero point 0, which can't be stored; "
            f"choose symmetric: true, or format: {GPTQ_V2.name}"
        )
    return codes_OI, zero_OG + lift_OG


def _refuse(fmt: str, modules: list[str], why: str | None) -> None:
    if modules and why:
        raise UnsupportedRecipe(f"{fmt}: {some(modules)} {why}")


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``, of either version.

    Raises:
        UnsupportedRecipe: see ``declared``.
    """
    version, bits = declared(config)
    return Decoder(
        anchors=ANCHORS,
        suffixes=SUFFIXES,
        required=SUFFIXES,
        header=lambda module, headers, read: header(headers),
        decode=lambda module, stored: version.decode(stored, bits),
        codes=lambda module, stored: version.codes(stored, bits),
    )
