"""Writes and reads compressed-tensors' part of config.json: the config group of each module.

Specification: ``compressed_tensors.quantization`` (0.20). Configurations that transformers 5.23 loads wrongly are
refused.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workers.errors import UnsupportedRecipe
from workers.formats.decoder import NO_NAMES
from workers.spec.formats import COMPRESSED_TENSORS
from workers.spec.layers import EXPERT as EXPERT
from workers.spec.layers import LayerKinds, layer_of
from workers.spec.runtimes import misfit
from workers.spec.schemes import Float8Scheme, IntScheme, LinearScheme, MicroscalingScheme

NAME = COMPRESSED_TENSORS.name
MIXED = "mixed-precision"
PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
MXFP4, NVFP4, MXFP8 = "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized"
Activations = Literal["none", "int8", "dynamic", "static", "mxfp4", "nvfp4", "mxfp8"]

_BYTE = {"symmetric": (True,), "strategy": ("tensor", "channel", "group")}
# Config values that can be read, for each stored form.
_READABLE: dict[str, dict[str, Any]] = {
    PACKED: {"type": ("int",), "num_bits": range(2, 9), "symmetric": (True, False), "strategy": ("channel", "group")},
    INT: {"type": ("int",), "num_bits": range(2, 9), **_BYTE},
    FLOAT: {"type": ("float",), "num_bits": (8,), **_BYTE},
    NAIVE: {"type": ("int", "float"), "num_bits": (8,), **_BYTE},
    MXFP4: {"type": ("float",), "num_bits": (4,), "symmetric": (True,), "group_size": (32,)},
    NVFP4: {"type": ("float",), "num_bits": (4,), "symmetric": (True,), "group_size": (16,)},
    MXFP8: {"type": ("float",), "num_bits": (8,), "symmetric": (True,), "group_size": (32,)},
}


@dataclass(frozen=True)
class Declared:
    """A module's settings in config.json: ``kind`` is int or float, ``activations`` the rounding of its input.

    ``symmetric``: there are no zero points.
    """

    form: str
    kind: str
    bits: int
    activations: Activations
    group_size: int | None = None
    symmetric: bool = True


def form_of(scheme: LinearScheme) -> str:
    """The library's stored form for weights of a scheme."""
    match scheme:
        case IntScheme():
            return INT if scheme.activations == "int8" else PACKED
        case Float8Scheme():
            return NAIVE if scheme.activations == "none" else FLOAT
        case MicroscalingScheme():
            return {"mxfp4": MXFP4, "nvfp4": NVFP4, "mxfp8": MXFP8}[scheme.type]


def quantization_config(
    schemes: Mapping[str, LinearScheme],
    unquantized: Iterable[str],
    conv1d: Iterable[str] = (),
    runtimes: Iterable[str] = (),
    in_model: Mapping[str, str] = NO_NAMES,
    speculative: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    ``schemes`` is each quantized module's scheme, fallbacks included; ``unquantized`` are the other Linear modules
    (where a module and its checkpoint key differ in name, both names); ``conv1d`` are those of ``schemes`` that are
    transformers' Conv1D; ``runtimes`` are those that a zoo names to check the artifact; ``in_model`` has the names in
    the model of those of ``schemes`` whose names in the checkpoint differ; ``speculative`` are those of ``unquantized``
    in blocks that transformers doesn't build.

    Raises:
        UnsupportedRecipe: there are Conv1D modules, or experts that a runtime which checks it loads wrongly.
    """
    unquantized = sorted(set(unquantized))
    conv1d = list(conv1d)
    alike = {scheme: _stored_alike(scheme) for scheme in set(schemes.values())}
    schemes = {name: alike[scheme] for name, scheme in schemes.items()}
    experts = [name for name in schemes if EXPERT.search(name)]
    # transformers 5.23 uses the first group for experts, and with dequantize=True for every other module too.
    base = Counter(schemes[name] for name in experts or schemes).most_common(1)[0][0]
    _refuse_unreadable(conv1d, base, LayerKinds(conv1d=True), runtimes)
    _refuse_unreadable(experts, base, LayerKinds(experts=True), runtimes)
    built = sorted(set(unquantized) - set(speculative))
    _refuse_uneven_experts([name for name in experts if schemes[name] != base], experts, built, base)
    groups = [{"targets": ["Linear"], **_contents(base)}]
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != base:
            stored = [name for name, other in schemes.items() if other == scheme]
            # vLLM goes by the checkpoint's names, transformers by the model's.
            names = sorted({*stored, *(in_model[name] for name in stored if name in in_model)})
            groups.append({"targets": names, **_contents(scheme)})
    forms = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": forms.pop() if len(forms) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": unquantized,
        "kv_cache_scheme": None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "version": importlib.metadata.version(NAME),
    }


class Declarations:
    """The declarations of config.json's ``quantization_config``, by module."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = [{"format": config.get("format"), **_without_none(g)} for g in config["config_groups"].values()]
        targets = [(target, group) for group in groups if group.get("weights") for target in group["targets"]]
        self._exact = dict(reversed(targets))
        self._patterns = [(re.compile(target[3:]), group) for target, group in targets if target.startswith("re:")]

    def of(self, module: str) -> Declared:
        """One module's declaration: looked up by name, then by pattern, then by class, as the library does.

        Raises:
            UnsupportedRecipe: no group targets it, or the group can't be decoded.
        """
        matched = (group for pattern, group in self._patterns if pattern.match(module))
        group = self._exact.get(module) or next(matched, None) or self._exact.get("Linear")
        if group is None:
            raise UnsupportedRecipe(f"{module}: quantized, but no config group targets it, got {list(self._exact)[:5]}")
        weights, form = group["weights"], group["format"]
        wanted = _READABLE.get(form)
        if wanted is None or any(weights.get(name) not in values for name, values in wanted.items()):
            names = ("type", "num_bits", "symmetric", "strategy", "group_size")
            got = {"format": form, **{name: weights.get(name) for name in names}}
            raise UnsupportedRecipe(
                f"{module}: can't decode {got}; known are "
                f"weights as {', '.join(_READABLE)}, symmetric if not packed, fp8 with scales for a tensor or channel"
            )
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        bits, rounded = int(weights["num_bits"]), _activations(module, group)
        return Declared(form, weights["type"], bits, rounded, size, bool(weights["symmetric"]))


def _without_none(group: Any) -> dict[str, Any]:
    """A group's settings that aren't None; empty for a preset's plain list of targets."""
    return {name: value for name, value in group.items() if value is not None} if isinstance(group, Mapping) else {}


def _activations(module: str, group: Mapping[str, Any]) -> Activations:
    given = group.get("input_activations")
    if given is None:
        return "none"
    match given["type"], given["num_bits"], given.get("strategy"), bool(given.get("dynamic")):
        case "int", 8, "token", True:
            return "int8"
        case "float", 8, "token", True:
            return "dynamic"
        case "float", 8, "tensor", False:
            return "static"
    match given["type"], given["num_bits"], given.get("group_size"), given.get("dynamic"):
        case "float", 4, 32, True:
            return "mxfp4"
        case "float", 8, 32, True:
            return "mxfp8"
        case "float", 4, 16, "local":
            return "nvfp4"
    raise UnsupportedRecipe(
        f"{module}: its input is rounded to {dict(given)}; known are 8 bits with a scale for each token, fp8 with one "
        "static scale, mxfp4, mxfp8, and nvfp4 with local scales"
    )


def has_cache_scales(config: Mapping[str, Any]) -> bool:
    """Whether attention modules have a scale for their keys and one for their values, in FP8.

    Raises:
        UnsupportedRecipe: keys and values are declared to be rounded otherwise.
    """
    given = config.get("kv_cache_scheme")
    if given is None:
        return False
    declaration = COMPRESSED_TENSORS.cache_declaration
    assert declaration is not None
    known = declaration["kv_cache_scheme"]
    if any(given.get(name) != known[name] for name in ("num_bits", "type", "strategy", "symmetric", "dynamic")):
        raise UnsupportedRecipe(f"{NAME}: kv_cache_scheme {dict(given)} can't be read; known is {known}")
    return True


def _stored_alike(scheme: LinearScheme) -> LinearScheme:
    """A representative of all schemes that are stored in the same way."""
    return scheme.model_copy(update={"indivisible": "refuse"}) if isinstance(scheme, IntScheme) else scheme


def _contents(scheme: LinearScheme) -> dict[str, Any]:
    """A config group without its targets."""
    return {
        "weights": {"symmetric": True, "dynamic": False, "observer": "minmax", **_weights(scheme)},
        "input_activations": _inputs(scheme),
        "output_activations": None,
        "format": form_of(scheme),
    }


def _weights(scheme: LinearScheme) -> dict[str, Any]:
    match scheme:
        case IntScheme():
            strategy = "group" if scheme.group_size else "channel"
            asymmetric = {} if scheme.symmetric else {"symmetric": False}
            sized = {"strategy": strategy, "group_size": scheme.group_size}
            return {"num_bits": scheme.bits, "type": "int", **sized, **asymmetric}
        case Float8Scheme():
            return {"num_bits": 8, "type": "float", "strategy": scheme.scales, "group_size": None}
        case MicroscalingScheme():
            return _microscaled(scheme)


def _microscaled(scheme: MicroscalingScheme) -> dict[str, Any]:
    nvfp4 = scheme.type == "nvfp4"
    return {
        "num_bits": 8 if scheme.type == "mxfp8" else 4,
        "type": "float",
        "strategy": "tensor_group" if nvfp4 else "group",
        "group_size": scheme.group_size,
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
    }


def _inputs(scheme: LinearScheme) -> dict[str, Any] | None:
    if scheme.activations == "none":
        return None
    if isinstance(scheme, MicroscalingScheme):
        local = {"dynamic": "local", "observer": "static_minmax"} if scheme.type == "nvfp4" else {"dynamic": True}
        return {"symmetric": True, **_microscaled(scheme), **local}
    static = scheme.activations == "static"
    return {
        "num_bits": 8,
        "type": "int" if scheme.activations == "int8" else "float",
        "symmetric": True,
        "strategy": "tensor" if static else "token",
        "group_size": None,
        "dynamic": not static,
        **({"observer": "minmax"} if static else {}),
    }


def _refuse_unreadable(modules: list[str], scheme: LinearScheme, kinds: LayerKinds, runtimes: Iterable[str]) -> None:
    """Refuse modules of these kinds if a runtime that checks the artifact can't load them."""
    why = misfit(NAME, scheme, kinds, tuple(runtimes)) if modules else None
    if why:
        raise UnsupportedRecipe(f"{NAME}: {some(modules)} {why}")


def _refuse_uneven_experts(uneven: list[str], experts: list[str], unquantized: list[str], base: LinearScheme) -> None:
    # transformers 5.23 decodes all experts by one group while it fuses them. It drops experts that aren't quantized,
    # unless that group is fp8, for which it looks for a scale before decoding.
    if experts or not isinstance(base, Float8Scheme):
        # Those of towers are modules of their own.
        uneven = uneven + [name for name in unquantized if EXPERT.search(name) and layer_of(name) is not None]
    if uneven:
        raise UnsupportedRecipe(
            f"{NAME}: the experts {some(uneven)} deviate (another scheme than other experts, or left as "
            "they are); transformers loads experts only if all of them have one scheme, or, beside fp8, if all are "
            "left as they are; choose a group_size that divides their width, don't ignore them, or choose method: "
            "bitsandbytes"
        )


def some(names: list[str]) -> str:
    """List the first three of many names."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
