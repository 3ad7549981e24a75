"""A quantized checkpoint, presented as the float checkpoint that it stands for.

The keys are those of the checkpoint that was quantized; a tensor is decoded when it is asked for, so that the streamed
forward reads an artifact as it reads its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from workers.checkpoint import Header, Source
from workers.errors import CheckpointError, UnsupportedRecipe
from workers.formats import awq, compressed_tensors, fp8, gptq
from workers.loading import build_on_meta, owners_of_keys

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")


@dataclass(frozen=True)
class Codec:
    """How one format is read; the functions get a module's name first.

    A module is quantized if one of ``anchors`` stands in the checkpoint under its name; the tensors of its weight are
    those of ``suffixes``, of which it has all that are ``required``. ``rounding`` also gets the kind of device.
    """

    anchors: tuple[str, ...]
    suffixes: tuple[str, ...]
    required: tuple[str, ...]
    header: Callable[[str, Mapping[str, Header], Callable[[str], Tensor]], Header]
    decode: Callable[[str, Mapping[str, Tensor]], Tensor]
    rounding: Callable[[str, Mapping[str, Tensor], str], Callable[[Tensor], Tensor] | None] = lambda *_: None


class Decoded:
    """An opened checkpoint (a ``checkpoint.TensorSource``) whose quantized weights are decoded by a codec."""

    def __init__(self, source: Source, codec: Codec) -> None:
        self._source = source
        self._codec = codec
        self._stored = _weights(source.headers, codec)
        owners = {key: module for module, names in self._stored.items() for key in names.values()}
        self.headers: dict[str, Header] = {}
        for key, header in source.headers.items():
            module = owners.get(key)
            if module is None:
                self.headers[key] = header
            elif f"{module}.weight" not in self.headers:
                self.headers[f"{module}.weight"] = self._header(module)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the modules whose weight is stored as codes."""
        return frozenset(self._stored)

    @property
    def bytes(self) -> int:
        """Bytes of all weight files, as they're stored."""
        return self._source.bytes

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous; a quantized weight in its format's float dtype.

        Raises:
            CheckpointError: there is none of that name, or what is stored isn't what config.json declares.
        """
        names = self._stored.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if names is None:
            return self._source.read(name)
        module = name.removesuffix(".weight")
        stored = {suffix: self._source.read(key) for suffix, key in names.items()}
        try:
            return self._codec.decode(module, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{module}: {error}") from error

    def input_rounding(self, module: str, device: str) -> Callable[[Tensor], Tensor] | None:
        """What transformers does to the input of a quantized module on a kind of device; None: nothing."""
        stored = self._stored[module]
        scales = {"input_scale": self._source.read(stored["input_scale"])} if "input_scale" in stored else {}
        return self._codec.rounding(module, scales, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)

    def _header(self, module: str) -> Header:
        names = self._stored[module]
        headers = {suffix: self._source.headers[key] for suffix, key in names.items()}
        try:
            return self._codec.header(module, headers, lambda suffix: self._source.read(names[suffix]))
        except CheckpointError as error:
            raise CheckpointError(f"{module}: {error}") from error


def open_decoded(folder: Path, *, trust_remote_code: bool = False) -> Source | Decoded:
    """Open a checkpoint by what its config.json says: quantized weights are decoded, a float checkpoint is as it is.

    Raises:
        CheckpointError: no readable config.json, or files that aren't a checkpoint.
        UnsupportedRecipe: a quantization that isn't known.
    """
    try:
        config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: no readable config.json ({error})") from error
    if config is None:
        return Source(folder)
    source = Source(folder)
    match config.get("quant_method"):
        case "awq":
            return Decoded(source, _awq(config))
        case "compressed-tensors":
            return Decoded(source, _compressed_tensors(config))
        case "fp8":
            return Decoded(source, _fp8(config))
        case "gptq":
            return Decoded(source, _gptq(config))
        case "bitsandbytes":
            return Decoded(source, _bitsandbytes(source, trust_remote_code))
        case other:
            raise UnsupportedRecipe(
                f"checkpoint {folder}: quant_method {other!r} in config.json; can decode {', '.join(METHODS)}"
            )


def _compressed_tensors(config: Mapping[str, Any]) -> Codec:
    said = compressed_tensors.Declarations(config).of
    return Codec(
        anchors=compressed_tensors.ANCHORS,
        suffixes=compressed_tensors.SUFFIXES,
        required=(),  # it depends on the module's group
        header=lambda module, headers, read: compressed_tensors.header(headers, read, said(module)),
        decode=lambda module, stored: compressed_tensors.decode(stored, said(module)),
        rounding=lambda module, stored, _: compressed_tensors.input_rounding(module, said(module), stored),
    )


def _fp8(config: Mapping[str, Any]) -> Codec:
    fp8.check_declared(config)
    return Codec(
        anchors=fp8.ANCHORS,
        suffixes=fp8.SUFFIXES,
        required=fp8.SUFFIXES,
        header=lambda module, headers, read: fp8.header(headers),
        decode=lambda module, stored: fp8.decode(stored),
        rounding=lambda module, stored, device: fp8.input_rounding(device),
    )


def _awq(config: Mapping[str, Any]) -> Codec:
    awq.check_declared(config)
    return Codec(
        anchors=awq.ANCHORS,
        suffixes=awq.SUFFIXES,
        required=awq.SUFFIXES,
        header=lambda module, headers, read: awq.header(headers),
        decode=lambda module, stored: awq.decode(stored),
    )


def _gptq(config: Mapping[str, Any]) -> Codec:
    version, bits = gptq.declared(config)
    return Codec(
        anchors=gptq.ANCHORS,
        suffixes=gptq.SUFFIXES,
        required=gptq.SUFFIXES,
        header=lambda module, headers, read: gptq.header(headers),
        decode=lambda module, stored: version.decode(stored, bits),
    )


def _bitsandbytes(source: Source, trust_remote_code: bool) -> Codec:
    from workers.formats import bitsandbytes  # importing the library takes seconds

    # What is stored doesn't tell a Conv1D, which has to be turned back: the model does.
    model = build_on_meta(source.folder, torch.float32, trust_remote_code)
    conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    owners = owners_of_keys(model, source.headers)
    stored_as = {key.removesuffix(".weight"): owner.removesuffix(".weight") for key, owner in owners.items()}
    transposed = {name for name, owner in stored_as.items() if owner in conv1d}
    return Codec(
        anchors=bitsandbytes.ANCHORS,
        suffixes=bitsandbytes.SUFFIXES,
        required=("weight",),
        header=lambda module, headers, read: bitsandbytes.header(headers, read, transposed=module in transposed),
        decode=lambda module, stored: bitsandbytes.decode(stored, transposed=module in transposed),
    )


def _weights(headers: Iterable[str], codec: Codec) -> dict[str, dict[str, str]]:
    """For each quantized module the keys of its weight, by their suffixes."""
    keys = set(headers)
    found = {key.removesuffix(f".{end}") for key in headers for end in codec.anchors if key.endswith(f".{end}")}
    weights = {
        module: {suffix: f"{module}.{suffix}" for suffix in codec.suffixes if f"{module}.{suffix}" in keys}
        for module in found
    }
    for module, names in weights.items():
        missing = [suffix for suffix in codec.required if suffix not in names]
        if missing:
            raise CheckpointError(f"{module}: quantized, but its {', '.join(missing)} isn't there; fetch it again")
    return weights
