"""Presents a quantized checkpoint as a float checkpoint.

The keys are those of the checkpoint that was quantized. A tensor is decoded when it is read, so that the streamed
forward reads an artifact like its source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from workers.checkpoint.containers import SOURCES
from workers.checkpoint.gguf_file import GgufSource
from workers.checkpoint.source import Header, Source, TensorSource
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats.decoder import Decoder
from workers.formats.table import CODECS
from workers.spec.formats import CACHE_SCALES, FORMATS, recognised
from workers.spec.workspace import DECODED_ON_A_CARD


class Decoded:
    """An opened checkpoint (a ``source.TensorSource``) whose quantized weights are decoded on ``device`` on reading."""

    def __init__(self, source: Source | GgufSource, decoder: Decoder, device: str = "cpu") -> None:
        self._source = source
        self._device = device
        self._tensors: TensorSource = decoder.view or source
        self._decoder = decoder
        self._stored = _weights(self._tensors.headers, decoder)
        owners = {key: module for module, names in self._stored.items() for key in names.values()}
        self.headers: dict[str, Header] = {}
        for key, header in self._tensors.headers.items():
            module = owners.get(key)
            if self.cache_scales and key.rpartition(".")[2] in CACHE_SCALES:
                continue  # of no weight, and not of the checkpoint that was quantized
            if module is None:
                self.headers[key] = header
            elif f"{module}.weight" not in self.headers:
                self.headers[f"{module}.weight"] = self._header(module)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the quantized modules."""
        return frozenset(self._stored)

    @property
    def cache_scales(self) -> bool:
        """Whether runtimes round keys and values before they cache them."""
        return self._decoder.cache_scales

    def scales_of_cache(self, attention: str) -> tuple[Tensor, Tensor]:
        """The scales, float [1], of the keys and the values of an attention module (by its name in the checkpoint).

        Raises:
            CheckpointError: it has none.
        """
        keys, values = (f"{attention}.{leaf}" for leaf in CACHE_SCALES)
        missing = [key for key in (keys, values) if key not in self._tensors.headers]
        if missing:
            raise CheckpointError(
                f"{attention}: config.json says that its cache is rounded, but {', '.join(missing)} isn't there; make "
                "the checkpoint anew"
            )
        return self._tensors.read(keys), self._tensors.read(values)

    @property
    def bytes(self) -> int:
        """Bytes of all weight files, as stored."""
        return self._source.bytes

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous; a quantized weight in its format's float dtype, on the device.

        Raises:
            CheckpointError: there is no such tensor, or the stored tensors don't match config.json.
        """
        names = self._stored.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if names is None:
            return self._tensors.read(name)
        module = name.removesuffix(".weight")
        device = self._device if math.prod(self.headers[name].shape) <= DECODED_ON_A_CARD else "cpu"
        stored = {
            suffix: self._tensors.read(key).to("cpu" if suffix in self._decoder.facts else device)
            for suffix, key in names.items()
        }
        try:
            return self._decoder.decode(module, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{module}: {error}") from error

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """What storing makes of a tensor that isn't quantized: mostly itself."""
        return self._source.as_stored(name, tensor) if isinstance(self._source, GgufSource) else tensor

    def input_rounding(self, module: str, device: str) -> Callable[[Tensor], Tensor] | None:
        """The rounding that transformers applies to a quantized module's input on a kind of device; None if none."""
        stored = self._stored[module]
        scales = {name: self._tensors.read(stored[name]) for name in self._scales_of_input(module)}
        return self._decoder.rounding(module, scales, device)

    def has_static_input(self, module: str) -> bool:
        """Whether a scale of a quantized module's input is stored, which inputs beyond calibration's exceed."""
        return bool(self._scales_of_input(module))

    def _scales_of_input(self, module: str) -> list[str]:
        return [name for name in self._decoder.activation_scales if name in self._stored[module]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)

    def _header(self, module: str) -> Header:
        names = self._stored[module]
        headers = {suffix: self._tensors.headers[key] for suffix, key in names.items()}
        try:
            return self._decoder.header(module, headers, lambda suffix: self._tensors.read(names[suffix]))
        except CheckpointError as error:
            raise CheckpointError(f"{module}: {error}") from error


def open_decoded(folder: Path, *, trust_remote_code: bool = False, device: str = "cpu") -> Source | Decoded:
    """Open a checkpoint according to its config.json: decode quantized weights, read a float checkpoint unchanged.

    ``device`` decodes, and has the decoded weights.

    Raises:
        CheckpointError: there is no readable config.json, or the files aren't a checkpoint.
        UnsupportedRecipe: the quantization is unknown.
    """
    try:
        config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: no readable config.json ({error})") from error
    if config is None:
        return Source(folder)
    row = recognised(config)
    if row is None:
        raise UnsupportedRecipe(
            f"checkpoint {folder}: quant_method {config.get('quant_method')!r} in config.json; can decode "
            f"{', '.join(sorted(FORMATS))}"
        )
    source = SOURCES[row.container](folder)
    return Decoded(source, CODECS[row.name].open(config, source, trust_remote_code), device)


def _weights(headers: Iterable[str], decoder: Decoder) -> dict[str, dict[str, str]]:
    """The keys of each quantized module's weight tensors, by suffix."""
    keys = set(headers)
    modules = {key.removesuffix(f".{end}") for key in headers for end in decoder.anchors if key.endswith(f".{end}")}
    weights = {
        module: {suffix: f"{module}.{suffix}" for suffix in decoder.suffixes if f"{module}.{suffix}" in keys}
        for module in modules
    }
    for module, names in weights.items():
        missing = [suffix for suffix in decoder.required if suffix not in names]
        if missing:
            raise CheckpointError(
                f"{module}: quantized, but its {', '.join(missing)} isn't there; make the checkpoint anew"
            )
    return weights
