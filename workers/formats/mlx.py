"""The mlx format, as mlx-lm writes and loads it: affine integers, MXFP4 and NVFP4.

Shapes: O output features, I input features, G groups of input columns. Specification: ``mlx.core.quantize`` (0.32) and
``mlx_lm.utils.load_model`` (0.32.2). Codes are unsigned, in a bit stream along the inputs, least significant bit first;
``weight = code * scale + bias``, with scales and biases in the model's dtype. Experts of a layer are stacked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import Header, Source
from workers.errors import CheckpointError, NumericalError, UnsupportedRecipe
from workers.formats.compressed_tensors.config import some
from workers.formats.decoder import NO_NAMES, Decoder
from workers.formats.mxfp4 import Fused, has_blocks
from workers.numerics import microscaling
from workers.numerics.codes import CodedWeight, Float4Weight, IntWeight
from workers.numerics.packing import WORD, pack, unpack
from workers.numerics.rounding import biases, dequantize_biased
from workers.spec.formats import MLX
from workers.spec.layers import LayerKinds
from workers.spec.mlx import expert_name
from workers.spec.runtimes import misfit
from workers.spec.schemes import IntScheme, LinearScheme

NAMES = ("weight", "scales", "biases")


def encode(weight: CodedWeight, scheme: LinearScheme) -> dict[str, Tensor]:
    """Return the stored tensors by their names within the module.

    ``weight`` uint32 (O, I * bits / 32); affine: ``scales`` and ``biases`` (O, G) in the dtype of the scales; mxfp4
    and nvfp4: ``scales`` uint8 (O, G), exponents or the bits of E4M3.

    Raises:
        NumericalError: a bias exceeds the range of its dtype.
    """
    if isinstance(weight, Float4Weight):
        scales_OG = weight.scale_OG.contiguous().view(torch.uint8)
        return {"weight": pack(weight.codes_OI, 4).view(torch.uint32), "scales": scales_OG}
    assert isinstance(weight, IntWeight), "the recipe refuses other schemes"
    bias_OG = biases(weight.scale_OG, weight.zero_OG, weight.bits)
    if not bool(bias_OG.isfinite().all()):
        raise NumericalError(f"mlx: a bias is too large for {bias_OG.dtype}; save the model in bfloat16")
    codes_OI = weight.codes_OI.to(torch.int32) + (1 << (weight.bits - 1))
    return {
        "weight": pack(codes_OI, weight.bits).view(torch.uint32),
        "scales": weight.scale_OG.contiguous(),
        "biases": bias_OG.contiguous(),
    }


def quantization_config(
    schemes: Mapping[str, LinearScheme],
    unquantized: Iterable[str],
    conv1d: Iterable[str] = (),
    runtimes: Iterable[str] = (),
    in_model: Mapping[str, str] = NO_NAMES,
    speculative: Iterable[str] = (),
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, which mlx-lm calls ``quantization``: the settings of most layers, and
    under their names those of the others.

    Raises:
        UnsupportedRecipe: there are Conv1D modules.
    """
    names, first = sorted(conv1d), next(iter(schemes.values()))
    if names and (why := misfit(MLX.name, first, LayerKinds(conv1d=True), runtimes)):
        raise UnsupportedRecipe(f"{MLX.name}: {some(names)} {why}")
    usual, _ = Counter(schemes.values()).most_common(1)[0]
    others = {name: _settings(scheme) for name, scheme in sorted(schemes.items()) if scheme != usual}
    others = {name: given for name, given in others.items() if given != _settings(usual)}
    return {**_settings(usual), **others}


def _settings(scheme: LinearScheme) -> dict[str, Any]:
    if isinstance(scheme, IntScheme):
        return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
    assert scheme.type in ("mxfp4", "nvfp4"), "the recipe refuses other schemes"
    return {"group_size": scheme.group_size, "bits": 4, "mode": scheme.type}


def decode(stored: Mapping[str, Tensor], declared: Mapping[str, Any]) -> Tensor:
    """Decode the tensors of one module to its weight (O, I), float32: mlx doesn't round decoded weights to the dtype of
    the scales before it multiplies.

    Raises:
        CheckpointError: the stored tensors don't match the declaration.
    """
    mode, bits, size = declared.get("mode", "affine"), declared["bits"], declared["group_size"]
    _, columns = _shape(stored["weight"].shape, stored["scales"].shape, bits, size)
    codes_OI = unpack(stored["weight"].view(torch.int32), bits, columns)
    if mode == "mxfp4":
        return microscaling.dequantize(codes_OI.to(torch.uint8), stored["scales"], None)
    if mode == "nvfp4":
        scales_OG = stored["scales"].view(torch.float8_e4m3fn)
        return microscaling.dequantize(codes_OI.to(torch.uint8), scales_OG, torch.ones(1, device=codes_OI.device))
    if mode != "affine" or "biases" not in stored:
        what = "no biases" if mode == "affine" else f"mode {mode!r}"
        raise CheckpointError(f"{what}, expected mode affine with biases, mxfp4 or nvfp4; make the checkpoint anew")
    return dequantize_biased(codes_OI, stored["scales"], stored["biases"])


def _shape(weight: tuple[int, ...], scales: tuple[int, ...], bits: int, group_size: int) -> tuple[int, int]:
    """Outputs and inputs of a module, from the stored shapes.

    Raises:
        CheckpointError: they contradict each other.
    """
    columns = scales[-1] * group_size
    if weight[-1] * WORD != columns * bits:
        raise CheckpointError(
            f"{weight[-1]} words for {scales[-1]} groups of {group_size}, expected {columns * bits // WORD} for the "
            f"{bits} bits that config.json declares"
        )
    return weight[0], columns


def open_(config: Mapping[str, Any], source: Source, trust_remote_code: bool) -> Decoder:
    """The decoder of a checkpoint with this ``quantization_config``."""
    model_type = json.loads((source.folder / "config.json").read_text()).get("model_type", "")
    view: Unstacked | Fused = Fused(source) if has_blocks(source) else Unstacked(source, model_type)

    def declared(module: str) -> Mapping[str, Any]:
        given = config.get(view.stored_name(f"{module}.weight").removesuffix(".weight"))
        return given if isinstance(given, dict) else config

    def header(module: str, headers: Mapping[str, Header]) -> Header:
        given = declared(module)
        shapes = headers["weight"].shape, headers["scales"].shape
        return Header(_shape(*shapes, given["bits"], given["group_size"]), torch.float32)

    return Decoder(
        anchors=("scales",),
        suffixes=NAMES,
        required=("weight", "scales"),
        header=lambda module, headers, read: header(module, headers),
        decode=lambda module, stored: decode(stored, declared(module)),
        view=view,
    )


class Unstacked:
    """A checkpoint (a ``source.TensorSource``) with one tensor for each expert, as the artifact's source has them."""

    def __init__(self, source: Source, model_type: str) -> None:
        self._source = source
        self._parts: dict[str, tuple[str, int]] = {}
        self.headers: dict[str, Header] = {}
        for key, header in source.headers.items():
            if expert_name(model_type, key, 0) is None:
                self.headers[key] = header
                continue
            for expert in range(header.shape[0]):
                name = expert_name(model_type, key, expert)
                assert name is not None, "the first expert has a name"
                self._parts[name] = key, expert
                self.headers[name] = Header(header.shape[1:], header.dtype)

    def stored_name(self, name: str) -> str:
        """The key of the file that holds a tensor."""
        return self._parts[name][0] if name in self._parts else name

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous."""
        if name in self._parts:
            return self._source.read_part(*self._parts[name])
        return self._source.read(name)
