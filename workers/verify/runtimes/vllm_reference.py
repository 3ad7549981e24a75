"""Reference arithmetic for vLLM where it has no kernel for this processor: PyTorch on the weights that vLLM loaded.

vLLM parses the configuration, creates its parameters and loads them (0.32); its choice of a kernel is replaced, and
after loading each quantized layer is decoded here from the parameters as they are, by the formats' definitions and
without quantmill's decoders.

Shapes: O outputs and I inputs of a layer, E experts, G groups of inputs, N tokens, K experts of a token.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from enum import EnumType
from typing import Any

from workers.spec.formats import AWQ
from workers.verify.runtimes import vllm_loading, vllm_rounding
from workers.verify.runtimes.reply import NotHere

# Functions of vLLM that choose a kernel, wherever they were imported to.
LINEAR_CHOICE = re.compile(r"^init_\w+_linear_kernel$")
EXPERTS_CHOICE = re.compile(r"^select_(\w+)_moe_backend$")
# Modules that choose kernels, and that vLLM imports only when a checkpoint needs them.
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_EXPERTS = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
LATE = (
    f"{_QUANTIZATION}.fp8", f"{_QUANTIZATION}.auto_gptq", f"{_QUANTIZATION}.auto_awq",
    f"{_QUANTIZATION}.compressed_tensors.compressed_tensors",
    *(f"{_EXPERTS}_{kind}" for kind in
      ("wna16", "w8a8_fp8", "w8a8_int8", "w4a4_nvfp4", "w4a4_mxfp4", "w8a8_mxfp8", "w4a8_mxfp4")),
)  # fmt: skip
# Backends of experts whose parameters have the checkpoint's layout, the first that there is.
PLAIN_BACKENDS = ("MARLIN", "TRITON")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class NoKernel:
    """Stands for a kernel: it's made and told of weights, and never computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def choose_no_kernels() -> None:
    """Replace vLLM's choices of kernels and its bounds on dtypes, in this process, before a model is made."""
    import torch

    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    for name in LATE:
        importlib.import_module(name)
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("vllm.") and m is not None]:
        for name, value in list(vars(module).items()):
            if not callable(value):
                continue
            if LINEAR_CHOICE.match(name):
                setattr(module, name, lambda *args, **kwargs: NoKernel())
            elif name == "choose_mp_linear_kernel":
                setattr(module, name, lambda *args, **kwargs: NoKernel)
            elif name == "resolve_kv_cache_dtype_string":
                setattr(module, name, lambda given, config: given)
            elif name == "expose_input_quant_key":
                setattr(module, name, lambda *args, **kwargs: None)
            elif EXPERTS_CHOICE.match(name) and name != "select_unquantized_moe_backend":
                setattr(module, name, _plain_backend(value))
            elif name == "check_moe_marlin_supports_config":
                setattr(module, name, lambda *args, **kwargs: True)
            elif inspect.isclass(value) and "get_supported_act_dtypes" in vars(value):
                # A class method in some classes, and in others not.
                quantization: Any = value
                quantization.get_supported_act_dtypes = staticmethod(lambda *args: dtypes)


def _plain_backend(select: Any) -> Callable[..., tuple[Any, None]]:
    """A choice of the backend whose parameters have the checkpoint's layout."""
    known = vars(sys.modules[select.__module__]).values()
    enums: list[Any] = [kind for kind in known if isinstance(kind, EnumType)]
    named = [kind for kind in enums if kind.__name__.lower().endswith("moebackend")]
    backends = {name: member for kind in named for name, member in kind.__members__.items()}
    chosen = next((backends[name] for name in PLAIN_BACKENDS if name in backends), None)
    return lambda *args, **kwargs: (chosen, None)


def use_reference(model: Any) -> int:
    """Let each quantized layer of a loaded model compute in PyTorch; returns their number.

    Raises:
        NotHere: a layer's parameters are of no format that is known here.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    count = 0
    for name, module in model.named_modules():
        if type(getattr(module, "quant_method", None)).__name__.startswith("Unquantized"):
            continue
        if isinstance(module, RoutedExperts):
            module._replace_quant_method(_experts(name, module))
            count += 1
        elif isinstance(module, LinearBase):
            module.quant_method = _linear(name, module)
            count += 1
    return count


def _linear(name: str, layer: Any) -> Any:
    """vLLM's method for a linear layer, whose weight is decoded."""
    import torch.nn.functional as F
    from vllm.model_executor.layers.linear import LinearMethodBase

    parameters = dict(layer.named_parameters(recurse=False))
    rounded = vllm_rounding.of_layer(name, layer, parameters)
    own = getattr(layer, "scheme", None) or layer.quant_method
    weight_OI = decoded(parameters, own, _output_sizes(layer))

    class Reference(LinearMethodBase):  # type: ignore[misc, unused-ignore]
        """Multiplies by the decoded weight."""

        def create_weights(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("its weights are loaded already")

        def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return F.linear(rounded(x), weight_OI.to(x.dtype), bias)

    return Reference()


def _output_sizes(layer: Any) -> list[int]:
    sizes = getattr(layer, "output_partition_sizes", None) or getattr(layer, "logical_widths", None)
    return list(sizes) if sizes else [layer.output_size_per_partition]


def _experts(name: str, layer: Any) -> Any:
    """vLLM's method for a layer's experts, whose weights are decoded: w13 is gate over up, [E, 2F, I]; w2 [E, I, F]."""
    import torch
    import torch.nn.functional as F
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    parameters = dict(layer.named_parameters(recurse=False))
    own = layer.quant_method
    stacks = {}
    for prefix in ("w13_", "w2_"):
        parts = _of(prefix, parameters)
        count = next(iter(parts.values())).shape[0]
        halves = 2 if prefix == "w13_" else 1
        stacks[prefix] = [decoded({n: p[e] for n, p in parts.items()}, own, halves) for e in range(count)]
    if str(getattr(layer.activation, "value", layer.activation)) != "silu":
        raise NotHere(f"{name}: experts with the activation {layer.activation}; silu is known")
    inputs, between = (vllm_rounding.of_layer(name, layer, _of(prefix, parameters)) for prefix in ("w13_", "w2_"))

    class Reference(FusedMoEMethodBase):  # type: ignore[misc, unused-ignore]
        """Computes each expert's tokens by its decoded weights."""

        def create_weights(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("its weights are loaded already")

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def apply(self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
            out = torch.zeros_like(x)
            for expert in topk_ids.unique().tolist():
                token, place = (topk_ids == expert).nonzero(as_tuple=True)
                gate, up = F.linear(inputs(x[token]), stacks["w13_"][expert].to(x.dtype)).chunk(2, -1)
                made = F.linear(between(F.silu(gate) * up), stacks["w2_"][expert].to(x.dtype))
                out.index_add_(0, token, made * topk_weights[token, place, None].to(x.dtype))
            return out

    return Reference(layer.moe_config)


def _of(prefix: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------- keys and values


def leave_cache_unrounded(vllm_config: Any) -> None:
    """Let a model that is made be one whose keys and values are cached as they are, for which there is a kernel.

    The scales of a checkpoint are loaded all the same.
    """
    if getattr(vllm_config.quant_config, "kv_cache_scheme", None):
        vllm_config.quant_config.kv_cache_scheme = None
        vllm_config.cache_config.cache_dtype = "auto"


def round_cached(model: Any) -> None:
    """Round what attention caches under the scales that were loaded, before it's cached."""
    for module in model.modules():
        if (scales := vllm_loading.cache_scales(module)) is not None:
            module.forward = _caching(module.forward, *map(vllm_rounding.static, scales))


def _caching(attend: Any, keys: vllm_rounding.Rounding, values: vllm_rounding.Rounding) -> Callable[..., Any]:
    def rounding(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return attend(query, keys(key), values(value), *args, **kwargs)

    return rounding


# ---------------------------------------------------------------------------------------------- weights


def decoded(parts: dict[str, Any], own: Any, fused: list[int] | int) -> Any:
    """The weight [O, I], float32, of a layer's parameters by their names in vLLM.

    ``own`` is vLLM's scheme or method, which knows bits and blocks; ``fused`` are the numbers of outputs of the layers
    that were fused, or how many of equal size.
    """
    import torch

    if "qweight" in parts:
        return _gptq_or_awq(parts, own)
    weight = parts.get("weight_packed", parts.get("weight"))
    if weight is None:
        raise NotHere(f"parameters {sorted(parts)} are of no format that is known here")
    if weight.dtype == torch.int32:
        return _packed_integers(weight.data, parts, own)
    if weight.dtype == torch.uint8:
        return _four_bit_floats(weight.data, parts)
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    if scale is None:
        raise NotHere(f"{weight.dtype} without a scale is of no format that is known here")
    if scale.dtype == torch.uint8:  # powers of two of groups of inputs
        exponent = scale.data.float() - 127
        return weight.data.float() * torch.exp2(exponent).repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    block = getattr(own, "weight_block_size", None)
    spread = _spread(scale.data.float(), weight.shape, fused, block)
    if weight.dtype == torch.float8_e4m3fn and block is None and scale.numel() not in (1, weight.shape[0]):
        # vLLM keeps one scale for a fused layer, the largest, and rounds the parts to it.
        return vllm_rounding.to_fp8(weight.data.float() * spread / spread.max()) * spread.max()
    return weight.data.float() * spread


def _spread(scale: Any, shape: Any, fused: list[int] | int, block: Any) -> Any:
    """A scale for each element of a weight [O, I], from one for each block, output, or fused layer."""
    import torch

    outputs, inputs = shape
    if block is not None:
        rows, columns = block
        return scale.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
    if scale.numel() == outputs:
        return scale.reshape(outputs, 1)
    sizes = [outputs // fused] * fused if isinstance(fused, int) else fused
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    return torch.repeat_interleave(scale.flatten(), torch.tensor(sizes)).reshape(outputs, 1)


def _packed_integers(packed: Any, parts: dict[str, Any], own: Any) -> Any:
    """pack-quantized of compressed-tensors: (code - zero) * scale, codes as bits along the inputs."""
    bits = own.num_bits
    scale_OG = parts["weight_scale"].data.float()
    group = own.group_size
    outputs = packed.shape[0]
    codes_OI = unpacked(packed, bits)
    # The bits of a row end within a word; groups of whole inputs say where.
    inputs = codes_OI.shape[1] if group in (-1, None) else scale_OG.shape[1] * group
    codes_OI = codes_OI[:, :inputs]
    size = inputs // scale_OG.shape[1]
    if "weight_zero_point" in parts:
        zero_OG = unpacked(parts["weight_zero_point"].data.t().contiguous(), bits).t()[:outputs]
        codes_OI = codes_OI - zero_OG.repeat_interleave(size, 1)
    else:
        codes_OI = codes_OI - (1 << (bits - 1))
    return codes_OI.float() * scale_OG.repeat_interleave(size, 1)


def unpacked(words: Any, bits: int) -> Any:
    """Codes of little-endian bit streams, int32 words along the last dimension."""
    import torch

    wide = words.to(torch.int64) & 0xFFFFFFFF
    stream = ((wide.unsqueeze(-1) >> torch.arange(32)) & 1).flatten(-2)
    count = stream.shape[-1] // bits
    return (stream[..., : count * bits].unflatten(-1, (count, bits)) << torch.arange(bits)).sum(-1)


def _gptq_or_awq(parts: dict[str, Any], own: Any) -> Any:
    """qweight, scales [G, O], qzeros: GPTQ packs codes along the inputs, AWQ along the outputs in its own order."""
    qweight, scales_GO = parts["qweight"].data, parts["scales"].data.float()
    config = own.quant_config
    bits = getattr(config, "weight_bits", None) or config.quant_type.size_bits
    if AWQ.name in type(own).__name__.lower():
        order = [0, 4, 1, 5, 2, 6, 3, 7] if bits == 4 else [0, 2, 1, 3]
        codes_IO = unpacked(qweight, bits).unflatten(-1, (-1, 32 // bits))[..., order].flatten(-2)
        zeros_GO = unpacked(parts["qzeros"].data, bits).unflatten(-1, (-1, 32 // bits))[..., order].flatten(-2)
    else:
        codes_IO = unpacked(qweight.t().contiguous(), bits).t()
        # vLLM reads this format as symmetric, and its kernels never look at the zero points.
        zeros_GO = scales_GO.new_full(scales_GO.shape, 1 << (bits - 1))
    size = codes_IO.shape[0] // scales_GO.shape[0]
    return ((codes_IO - zeros_GO.repeat_interleave(size, 0)).float() * scales_GO.repeat_interleave(size, 0)).t()


def _four_bit_floats(packed: Any, parts: dict[str, Any]) -> Any:
    """E2M1, two in a byte, the lower half first: nvfp4 with E4M3 and a global divisor, mxfp4 with powers of two."""
    import torch

    grid = torch.tensor([*E2M1, *(-value for value in E2M1)])
    values = grid[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]
    scale = parts["weight_scale"].data
    if "weight_global_scale" in parts:
        # vLLM takes the largest of a fused layer's divisors for all of it.
        spread = scale.float() / parts["weight_global_scale"].data.float().max()
    else:
        spread = torch.exp2(scale.float() - 127)
    return values * spread.repeat_interleave(values.shape[-1] // spread.shape[-1], -1)
