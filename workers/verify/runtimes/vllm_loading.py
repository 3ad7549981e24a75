"""Checks what vLLM's loader set: every parameter, and that what it fuses shares one global scale.

vLLM's own check of completeness lets scales pass that no tensor of the checkpoint set (0.32).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workers.spec.formats import CACHE_SCALES

# Leaves of the names of parameters that a checkpoint must set; experts' have a prefix. Others, as scales of a cache,
# have defaults.
REQUIRED = frozenset({
    "weight", "bias", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_global_scale",
    "input_scale", "input_global_scale", "qweight", "qzeros", "scales",
})  # fmt: skip
EXPERTS = ("w13_", "w2_")
GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")
# Byte that integers are filled with before loading; a whole row of it wasn't set.
UNSET_BYTE = 0x55
# Set on attention modules whose checkpoint declares scales of keys and values.
CACHED = "scales_are_declared"
# A row of fewer bytes may hold that by chance.
LEAST_ROW = 8
E8M0_NAN = 0xFF
# Names of parameters in a message.
NAMED = 4


def leaf_of(name: str) -> str:
    """The last part of a parameter's name, without the prefix of experts."""
    leaf = name.rpartition(".")[2]
    return next((leaf.removeprefix(prefix) for prefix in EXPERTS if leaf.startswith(prefix)), leaf)


def fill(model: Any) -> None:
    """Fill what a checkpoint must set with NaN, or with ``UNSET_BYTE``, before it's loaded."""
    import torch

    for name, parameter in _required(model):
        if not parameter.numel():
            continue
        if parameter.dtype.is_floating_point:
            parameter.data.copy_(torch.full((), float("nan")).to(parameter.dtype).expand_as(parameter))
        else:
            parameter.data.view(torch.uint8).fill_(_mark(name, parameter))


def expect_cache_scales(model: Any, declared: bool) -> None:
    """Note, of a model that was made, that a checkpoint must set the scales of keys and values if it declares them."""
    for module in model.modules():
        if declared and all(hasattr(module, name) for name in CACHE_SCALES):
            setattr(module, CACHED, True)


def cache_scales(module: Any) -> tuple[Any, Any] | None:
    """The scales [] of an attention module's keys and values as they were loaded; None without any."""
    if not getattr(module, CACHED, False):
        return None
    keys, values = (getattr(module, name).data.float().max() for name in CACHE_SCALES)
    return keys, values


def unset(model: Any) -> list[str]:
    """Names of parameters that loading left as ``fill`` made them, wholly or in part, sorted."""
    return sorted(name for name, tensor in _required(model) if _is_unset(name, tensor))


def _required(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters that a checkpoint must set, with their names."""
    for prefix, module in model.named_modules():
        # vLLM makes scales of inputs for experts whose inputs aren't rounded, too.
        unrounded = getattr(getattr(module, "quant_method", None), "use_a16", False)
        for name, parameter in module.named_parameters(recurse=False):
            leaf = leaf_of(name)
            if leaf in CACHE_SCALES and getattr(module, CACHED, False):
                yield f"{prefix}.{name}".removeprefix("."), parameter
            if leaf in REQUIRED and not (unrounded and leaf.startswith("input_")):
                yield f"{prefix}.{name}".removeprefix("."), parameter


def _mark(name: str, parameter: Any) -> int:
    """The byte that integers are filled with: of scales that are powers of two, NaN."""
    return E8M0_NAN if leaf_of(name) == "weight_scale" and parameter.element_size() == 1 else UNSET_BYTE


def _is_unset(name: str, tensor: Any) -> bool:
    import torch

    if not tensor.numel():
        return False
    if tensor.dtype.is_floating_point:
        return bool(tensor.data.float().isnan().any())
    mark = _mark(name, tensor)
    same = tensor.data.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous().view(torch.uint8) == mark
    if mark == E8M0_NAN:
        return bool(same.any())
    return bool(same.all(-1).any() if same.shape[1] >= LEAST_ROW else same.all())


def unset_problem(names: list[str]) -> str:
    """Why a model with these parameters unset is refused, with the remedy."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"no tensor of the checkpoint sets {', '.join(names[:NAMED])}{more}, which vLLM doesn't notice; either they "
        "are missing, or their layers are in high precision and quantization_config doesn't list them as such (ignore, "
        "modules_to_not_convert)"
    )


def split_scales(model: Any) -> Iterator[str]:
    """Messages about fused layers whose parts have several global scales, of which vLLM takes the largest."""
    for name, tensor in _required(model):
        if leaf_of(name) not in GLOBAL_SCALES:
            continue
        rows = tensor.data.float().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
        # A matrix of experts' scales has a row for each expert; what is down has one scale for each.
        if name.rpartition(".")[2].startswith("w2_"):
            continue
        different = (rows.amax(-1) != rows.amin(-1)).nonzero().flatten().tolist()
        if different:
            values = ", ".join(f"{value:g}" for value in sorted(set(rows[different[0]].tolist())))
            yield (
                f"runtime vLLM: {name}: the parts of this fused layer have several global scales ({values}), of which "
                "vLLM takes the largest for all; quantize them with one"
            )
