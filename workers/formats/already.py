"""Whether the codes that a source has are those that a recipe asks for, so that they are stored as they are."""

from __future__ import annotations

from collections.abc import Mapping

from workers.errors import NumericalError, UnsupportedRecipe
from workers.formats.kept import DecodedSource, converted
from workers.formats.table import CODECS
from workers.numerics.codes import CodedWeight, Float4Weight, Float8Weight, IntWeight, Mxfp8Weight
from workers.spec.fusion import together
from workers.spec.schemes import Float8Scheme, IntScheme, LinearScheme, MicroscalingScheme, has_tensor_scale


def kept_codes(source: DecodedSource, schemes: Mapping[str, LinearScheme], fmt: str) -> dict[str, CodedWeight]:
    """The source's codes of those modules, by name, whose scheme it has already and whose scales the format holds.

    ``schemes`` are the modules' in the recipe. Parts of what runtimes fuse under one scale of a whole tensor are kept
    together or not at all.
    """
    found = {module: coded for module, scheme in schemes.items() if (coded := _codes(source, module, scheme, fmt))}
    for parts in together(schemes):
        if has_tensor_scale(schemes[parts[0]]) and not all(part in found for part in parts):
            for part in parts:
                found.pop(part, None)
    return found


def _codes(source: DecodedSource, module: str, scheme: LinearScheme, fmt: str) -> CodedWeight | None:
    try:
        weight = source.codes(module)
        if weight is None or not has_scheme(weight, scheme):
            return None
        if isinstance(weight, IntWeight):
            assert isinstance(scheme, IntScheme), "has_scheme says so"
            weight = converted(module, weight, scheme, fmt)
            encode = CODECS[fmt].encode
            if weight.zero_OG is not None and encode is not None:
                encode(weight, scheme)  # a zero point may have no place in the format
    except (NumericalError, UnsupportedRecipe):
        return None  # the format can't hold them exactly: they are solved for like any others
    return weight


def has_scheme(weight: CodedWeight, scheme: LinearScheme) -> bool:
    """Whether codes and scales, and the scales of inputs where the scheme stores some, are of a scheme's kind."""
    match weight, scheme:
        case IntWeight(), IntScheme():
            symmetric = weight.zero_OG is None
            columns = weight.codes_OI.shape[1]
            groups = columns // (scheme.group_size or columns)
            return (weight.bits, weight.scale_OG.shape[1], symmetric) == (scheme.bits, groups, scheme.symmetric)
        case Float8Weight(), Float8Scheme():
            tensor = weight.scale.numel() == 1
            kind = "block" if weight.blocks else "tensor" if tensor and weight.scale.dim() == 1 else "channel"
            return kind == scheme.scales and (scheme.activations == "static") == (weight.input_scale is not None)
        case Float4Weight(), MicroscalingScheme(type="nvfp4"):
            rounded = scheme.activations == "dynamic"
            return weight.global_scale is not None and rounded == (weight.input_global_scale is not None)
        case Float4Weight(), MicroscalingScheme(type="mxfp4"):
            return weight.global_scale is None
        case Mxfp8Weight(), MicroscalingScheme(type="mxfp8"):
            return True
    return False
