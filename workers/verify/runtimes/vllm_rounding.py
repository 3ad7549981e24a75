"""How a quantized layer's inputs, and the keys and values that are cached, are rounded in vLLM's reference arithmetic.

By the definitions of vLLM 0.32 (its emulation of NVFP4, its PyTorch code of MXFP8) and without quantmill's decoders;
vLLM has no PyTorch code of MXFP4, whose exponents are compressed-tensors' there. Shapes: inputs are [..., I].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.verify.runtimes.reply import NotHere

FP8_MAX, INT8_MAX, E2M1_MAX = 448.0, 127.0, 6.0
NVFP4_GROUP, MX_GROUP = 16, 32
# Added to a float32's bits, this carries magnitudes from 1.75 times a power of two on to the next one.
QUARTER, EXPONENT = 0x200000, 0x7F800000
# Exponents of the largest powers of two of E2M1, and of scales that are powers of two.
E2M1_EXPONENT, LEAST, MOST = 2, -127, 127

Rounding = Callable[[Any], Any]


def of_layer(name: str, layer: Any, parameters: dict[str, Any]) -> Rounding:
    """How a layer's inputs are rounded, by the checkpoint's configuration as vLLM has parsed it."""
    config: Any = getattr(layer, "quant_config", None) or getattr(layer.quant_method, "quant_config", None)
    if hasattr(config, "get_scheme_dict"):
        experts = getattr(layer, "ckpt_gate_proj_name", None)
        found = config.get_scheme_dict(layer, f"{name}.0.{experts}" if experts else name) or {}
        return rounding_of(found.get("input_activations"), parameters)
    if block := getattr(config, "weight_block_size", None):
        return lambda x: _by_groups(x, block[1], FP8_MAX, to_fp8)
    if getattr(config, "activation_scheme", None) == "static":
        return static(parameters["input_scale"].data.float().max())
    return lambda x: x


def rounding_of(given: Any, parameters: dict[str, Any]) -> Rounding:
    """The rounding of compressed-tensors' ``input_activations``.

    Raises:
        NotHere: a combination that is unknown here.
    """
    if given is None:
        return lambda x: x
    kind, strategy = (str(getattr(value, "value", value)) for value in (given.type, given.strategy))
    match kind, given.num_bits, strategy, given.group_size:
        case "float", 8, "tensor", _ if not given.dynamic:
            return static(parameters["input_scale"].data.float().max())
        case "float", 8, "token", _:
            return lambda x: _by_groups(x, x.shape[-1], FP8_MAX, to_fp8)
        case "float", 8, "group", 32 if given.dynamic is True:
            return mxfp8
        case "float", 8, "group", int(size):
            return lambda x: _by_groups(x, size, FP8_MAX, to_fp8)
        case "float", 4, "group", 32 if given.dynamic is True:
            return mxfp4
        case "float", 4, "tensor_group", 16:
            # Of a fused layer's divisors vLLM takes the largest.
            divisor = parameters["input_global_scale"].data.float().max()
            return lambda x: nvfp4(x, divisor)
        case "int", 8, "token", _:
            return lambda x: _by_groups(x, x.shape[-1], INT8_MAX, lambda v: v.round().clamp(-128, 127))
    raise NotHere(f"activations of {given.num_bits} bits, {kind}, by {strategy}: no reference arithmetic")


def static(scale: Any) -> Rounding:
    """E4M3 under one scale [] for all inputs; what is larger is clipped."""
    return lambda x: (to_fp8((x.float() / scale).clamp(-FP8_MAX, FP8_MAX)) * scale).to(x.dtype)


def nvfp4(x: Any, divisor: Any) -> Any:
    """E2M1 under an E4M3 scale for each 16 inputs, which ``divisor`` [] divides (vLLM's ``ref_nvfp4_quant``)."""
    groups = x.float().unflatten(-1, (-1, NVFP4_GROUP))
    scale = to_fp8((divisor * groups.abs().amax(-1, keepdim=True) / E2M1_MAX).clamp(max=FP8_MAX)) / divisor
    return _under(groups, scale, to_e2m1).to(x.dtype)


def mxfp4(x: Any) -> Any:
    """E2M1 under a power of two for each 32 inputs, which goes up for magnitudes from 1.75 times one on."""
    import torch

    groups = x.float().unflatten(-1, (-1, MX_GROUP))
    largest = groups.abs().amax(-1, keepdim=True).contiguous()
    rounded = ((largest.view(torch.int32) + QUARTER) & EXPONENT).view(torch.float32)
    exponent = torch.log2(rounded) - E2M1_EXPONENT
    return _under(groups, torch.exp2(exponent.clamp(LEAST, MOST)), to_e2m1).to(x.dtype)


def mxfp8(x: Any) -> Any:
    """E4M3 under the least power of two that clips none of 32 inputs (vLLM's ``_mxfp8_e4m3_quantize_torch``)."""
    import torch

    groups = x.float().unflatten(-1, (-1, MX_GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    exponent = torch.ceil(torch.log2(largest / FP8_MAX)).clamp(LEAST, MOST)
    return _under(groups, torch.exp2(exponent), to_fp8).to(x.dtype)


def _by_groups(x: Any, size: int, largest: float, grid: Rounding) -> Any:
    """Round to a grid under a scale for each group of ``size`` values, from its largest magnitude."""
    groups = x.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return _under(groups, scale, grid).to(x.dtype)


def _under(groups: Any, scale: Any, grid: Rounding) -> Any:
    """Groups [..., G, g] rounded to a grid under their scales [..., G, 1], flat; 0 under a scale of 0."""
    divisor = scale.where(scale != 0, 1.0)
    return (grid(groups / divisor) * scale).flatten(-2)


def to_fp8(x: Any) -> Any:
    """The nearest numbers of E4M3, float32."""
    import torch

    return x.to(torch.float8_e4m3fn).float()


def to_e2m1(x: Any) -> Any:
    """The nearest numbers of E2M1, float32, ties to the even code; clamped to 6."""
    m = x.abs().clamp(max=E2M1_MAX)
    fine, middle, coarse = (m * 2).round() / 2, m.round(), (m / 2).round() * 2
    return fine.where(m < 2, middle.where(m < 4, coarse)).copysign(x)
