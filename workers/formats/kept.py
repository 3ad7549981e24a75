"""Opens sources that are quantized already, and puts their codes into another format without changing a weight.

O output features, I input features, G groups of input columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import DTYPES, Header, Source, SplitSource
from workers.errors import CheckpointError, NumericalError, UnsupportedModel
from workers.formats import mxfp4
from workers.formats.decoded import Decoded
from workers.formats.decoder import Decoder
from workers.formats.table import CODECS
from workers.numerics import ggml
from workers.numerics.codes import CodedWeight, IntWeight
from workers.spec import kept, low_bit
from workers.spec.checkpoint_files import CheckpointFiles
from workers.spec.families import family_of
from workers.spec.formats import FORMATS
from workers.spec.ggml import TYPES
from workers.spec.job import ModelPin
from workers.spec.schemes import IntScheme
from workers.spec.tensors import TensorHeader

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class QuantizedSource(Decoded):
    """A source that is quantized already, under the names and shapes of its weights."""

    def __init__(self, folder: Path, source: Source, decoder: Decoder) -> None:
        super().__init__(source, decoder)
        self.folder = folder
        self.variant: str | None = source.variant

    @property
    def files(self) -> CheckpointFiles:
        """The files of the checkpoint."""
        return self._source.files

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(math.prod(header.shape) * header.dtype.itemsize for header in self.headers.values())

    def _is_decoded(self, key: str) -> bool:
        module, _, leaf = key.rpartition(".")
        return leaf == "weight" and module in self._stored

    def _stored_tensors(self, module: str) -> dict[str, Tensor]:
        return {name: self._tensors.read(key) for name, key in self._stored[module].items()}


class DecodedSource(QuantizedSource):
    """A source whose weights are those that it decodes to, in the dtype that its config.json names.

    Raises:
        UnsupportedModel: it isn't known how it is decoded.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], source: Source) -> None:
        found = low_bit.read(config, _headers(source))
        if isinstance(found, str):
            raise UnsupportedModel(f"checkpoint {folder}: it can't be decoded: {found}")
        open_ = mxfp4.open_ if found.format == low_bit.MXFP4 else CODECS[found.format].open
        super().__init__(folder, source, open_(config["quantization_config"], source, False))
        self._dtype = DTYPES[found.dtype]
        self.headers = {
            key: Header(header.shape, self._dtype) if self._is_decoded(key) else header
            for key, header in self.headers.items()
        }

    def _is_decoded(self, key: str) -> bool:
        return super()._is_decoded(key) or key not in self._source.headers

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous; a quantized weight in the dtype that config.json names."""
        tensor = super().read(name)
        return tensor.to(self._dtype) if self._is_decoded(name) else tensor

    def blocks(self, key: str) -> dict[str, Tensor]:
        """The MXFP4 tensors of a layer's experts, by their keys; empty for other tensors."""
        return self._tensors.stored(key) if isinstance(self._tensors, mxfp4.Fused) else {}

    def has_blocks(self, key: str) -> bool:
        """Whether a tensor is stored as a layer's experts in MXFP4."""
        return isinstance(self._tensors, mxfp4.Fused) and self._is_decoded(key)

    def codes(self, module: str) -> CodedWeight | None:
        """The codes of a module, as stored; None if it has none, or of a kind that no recipe makes.

        Raises:
            UnsupportedRecipe: they are of a kind that no other format holds.
        """
        if module not in self._stored or self._decoder.codes is None:
            return None
        return self._decoder.codes(module, self._stored_tensors(module))


class KeptSource(QuantizedSource):
    """A source with its ``codes``, as they are stored.

    Weights are read as the source's own runtimes decode them: they are the reference of what is made of it.

    Raises:
        UnsupportedModel: its codes can't be kept.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], source: Source) -> None:
        declared = config["quantization_config"]
        found = kept.read(declared, _headers(source))
        if isinstance(found, str):
            raise UnsupportedModel(f"checkpoint {folder}: method: keep can't read it: {found}")
        self.kept = found
        decoder = CODECS[found.format].open(declared, source, False)
        assert decoder.codes is not None, "formats that can be kept have codes"
        self._codes = decoder.codes
        super().__init__(folder, source, decoder)

    def codes(self, module: str) -> IntWeight:
        """The codes of a quantized module, as stored.

        Raises:
            UnsupportedRecipe: they are of a kind that no other format holds.
        """
        found = self._codes(module, self._stored_tensors(module))
        assert isinstance(found, IntWeight), "spec.kept reads integers alone"
        return found

    def exact(self, key: str) -> Tensor | None:
        """A quantized weight before any rounding to half precision, float32; None for other tensors."""
        return self.codes(key.removesuffix(".weight")).dequantize() if self._is_decoded(key) else None


OpenSource = Source | QuantizedSource


def _headers(source: Source) -> tuple[TensorHeader, ...]:
    return tuple(TensorHeader(name, h.shape, DTYPE_NAMES[h.dtype]) for name, h in source.headers.items())


def open_source(folder: Path, model: ModelPin) -> OpenSource:
    """Open a job's source: decoded if it is quantized already, with its codes for recipes that keep them.

    Raises:
        CheckpointError: the files aren't a checkpoint.
        UnsupportedModel: its codes can't be kept.
    """
    whole = _config(folder)
    stacked = family_of(whole.get("model_type")).split_experts and not whole.get("quantization_config")
    opener = SplitSource if stacked else Source
    source = opener(folder, allow_pickle=model.allow_pickle, variant=model.variant)
    with ExitStack() as opened:
        opened.enter_context(source)
        kind = DecodedSource if model.dequantize else KeptSource
        found = kind(folder, whole, source) if whole.get("quantization_config") else source
        opened.pop_all()
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: no readable config.json ({error})") from error
    return whole


def converted(module: str, weight: IntWeight, scheme: IntScheme, fmt: str) -> IntWeight:
    """The same weight under a scheme of ``spec.kept.stored_as``, with scales of the dtype that a format stores.

    Raises:
        NumericalError: the format's dtype can't hold a scale, or a bias, exactly.
    """
    columns, row = weight.codes_OI.shape[1], FORMATS[fmt]
    groups = columns // (scheme.group_size or columns)
    times = groups // weight.scale_OG.shape[1]
    scale_OG, zero_OG = weight.scale_OG, weight.zero_OG
    if scheme.symmetric and zero_OG is not None:
        raise NumericalError(f"{module}: its config.json declares symmetric codes, but it has other zero points")
    if not scheme.symmetric and zero_OG is None:
        zero_OG = torch.zeros_like(scale_OG, dtype=torch.int8)
    if times > 1:
        scale_OG = scale_OG.repeat_interleave(times, dim=1)
        zero_OG = None if zero_OG is None else zero_OG.repeat_interleave(times, dim=1)
    if row.scale_dtype == "float16":
        scale_OG = scale_OG.to(torch.float16)
    if row.real_zeros and zero_OG is not None:
        # A bias is the scale times the zero point, which half precision would round.
        scale_OG = scale_OG.float()
    made = IntWeight(weight.codes_OI, scale_OG, zero_OG, weight.bits, scheme.group_size)
    _require_same(module, weight, made, fmt)
    return made


def blocks(module: str, weight: IntWeight, kind: str) -> Tensor:
    """The blocks of Q4_0 or Q8_0, uint8 (O, R), of a symmetric weight.

    Raises:
        NumericalError: float16 can't hold a scale exactly, or there are zero points.
    """
    if weight.zero_OG is not None:
        raise NumericalError(f"{module}: its config.json declares symmetric codes, but it has other zero points")
    rows, columns = weight.codes_OI.shape
    times = columns // kept.BLOCK // weight.scale_OG.shape[1]
    scale_OG = weight.scale_OG.to(torch.float16).repeat_interleave(times, dim=1)
    _require_same(module, weight, replace(weight, scale_OG=scale_OG, group_size=kept.BLOCK), kind)
    raw_OR = torch.zeros(rows, TYPES[kind].row_bytes(columns), dtype=torch.uint8)
    raw_OR = ggml.with_grid(kind, raw_OR, ggml.Grid(scale_OG.float(), None))
    return ggml.with_numbers(kind, raw_OR, weight.codes_OI.float())


def _require_same(module: str, weight: IntWeight, made: IntWeight, fmt: str) -> None:
    same = made.dequantize() == weight.dequantize()
    if not bool(same.all()):
        raise NumericalError(
            f"{module}: {int((~same).sum())} of its weights would change in {fmt}: a scale of "
            f"{weight.scale_OG.abs().max().item():.3g} in {weight.scale_OG.dtype} isn't one of {made.scale_OG.dtype}; "
            "choose another format"
        )
