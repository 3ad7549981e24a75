"""The table of formats, in which quantized weights are stored. ``formats.table`` has the codecs.

To add a format, add a row here, a codec under the same name in ``workers/formats/table.py``, and the runtimes that read
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, WithJsonSchema

from workers.spec import ggml, mlx
from workers.spec.base import meant
from workers.spec.schemes import (
    FP8_BLOCK,
    Float8Scheme,
    FourBitFloatScheme,
    GgmlScheme,
    GgufScheme,
    IntScheme,
    LlmInt8Scheme,
    MicroscalingScheme,
    Scheme,
    TransformersScheme,
)
from workers.spec.tensors import TensorHeader

# A runtime's arithmetic with a format's weights: in any requested dtype; in the format's own dtype, whatever is
# requested; or decoded to float32 on loading, next to layers that stay in half precision.
Arithmetic = Literal["any", "own", "decoded"]


# Names of the scales of keys and values within their attention module.
CACHE_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Format:
    """One format.

    ``says`` describes it in error messages and the README. ``stored`` lists the tensors of one quantized module, by
    their names within the module, for a weight (O, I); the planned size is computed from them. ``multiple_OI`` must
    divide outputs and inputs; ``group_sizes`` are those that its readers have kernels for (None: any; an element None
    stands for one scale per output channel). ``experts`` is why a mixture's experts stay in half precision in this
    format. ``without_weight``: whether a module stored under a scheme lacks the plain ``weight`` that transformers'
    initialization of some families reads. ``declares`` recognises a ``quantization_config`` of config.json, and
    ``family`` returns the family of gates of such a config, or several if it has mixed schemes.

    ``per_layer_schemes``: layers may have schemes of their own. ``conv1d``: Conv1D layers can be stored.
    ``scale_dtype``: dtype that scales are rounded to. ``container``: what the weights are written as
    (``checkpoint.containers.WRITERS``). ``arithmetic`` says how runtimes compute with such a config. ``needs``:
    distributions for writing and decoding. ``only_method`` is the one method that writes the format, if others can't.
    ``file_bytes`` is the planned size of a whole file, for formats that store more than tensors one by one, from a
    scheme, all matrices (key, outputs and inputs, bytes in the source) and config.json; ``deviations`` are what of the
    same will be stored otherwise than the scheme says, in words.
    ``lists_unquantized``: config.json names the modules that stay in half precision.

    ``settings`` are the keys of config.json that its readers need beside the source's and ``quantization_config``, from
    all of those. ``outside``: embeddings and head can be quantized. ``real_zeros``: zero points are stored as biases.
    ``tensor_scales``: nvfp4's scale of a whole tensor is stored; without it, a group's scale is what E4M3 holds.
    ``place`` says of a model_type and the name of a tensor or module in the source where it is stored, if it is one of
    several in a stack. ``keeps``: integers of a source that is quantized already can be written as they are
    (``spec.kept``). ``towers``: the file holds a multimodal model's towers, too.
    ``decoded``: quantmill has a decoder of its own; of formats without one, the runtime's predictions are measured.
    ``cache_declaration``: what ``quantization_config`` says of keys and values in FP8, whose scales
    are tensors of their attention modules (``CACHE_SCALES``).
    ``blocks``: experts that the source has in one MXFP4 tensor (``spec.low_bit``) are stored as they are.
    ``decodes_on_loading``: where transformers' kernels for it don't run, it can decode the weights instead.
    ``packed_on_card``: transformers keeps the codes on a card, others are decoded to half precision there.
    ``speculative``: its readers take quantized layers of a speculative block, which the model's class doesn't build.
    """

    name: str
    says: str
    holds: Callable[[Scheme], bool]
    stored: Callable[[Scheme, TensorHeader], list[TensorHeader]]
    declares: Callable[[Mapping[str, Any]], bool]
    family: Callable[[Mapping[str, Any]], list[str]]
    per_layer_schemes: bool = False
    conv1d: bool = False
    experts: Callable[[Scheme], str | None] = lambda scheme: None
    scale_dtype: Literal["float16", "checkpoint"] = "checkpoint"
    container: Literal["shards", "file", "mlx-shards"] = "shards"
    multiple_OI: tuple[int, int] = (1, 1)
    group_sizes: tuple[int | None, ...] | None = None
    without_weight: Callable[[Scheme], bool] = lambda scheme: False
    arithmetic: Callable[[Mapping[str, Any]], Arithmetic] = lambda config: "any"
    needs: tuple[str, ...] = ()
    only_method: str | None = None
    file_bytes: Callable[[Scheme, Iterable[tuple[str, tuple[int, int], int]], Mapping[str, Any]], int] | None = None
    deviations: Callable[[Scheme, Iterable[tuple[str, tuple[int, int], int]], Mapping[str, Any]], tuple[str, ...]] = (
        lambda scheme, matrices, config: ()
    )
    lists_unquantized: bool = False
    real_zeros: bool = False
    tensor_scales: bool = True
    outside: bool = False
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    place: Callable[[str, str], mlx.Place | None] = lambda model_type, name: None
    keeps: bool = False
    towers: bool = True
    decoded: bool = True
    cache_declaration: Mapping[str, Any] | None = None
    blocks: bool = False
    speculative: bool = False
    packed_on_card: bool = False
    decodes_on_loading: bool = False


# ------------------------------------------------------------------------------------- compressed-tensors


def _ct_holds(scheme: Scheme) -> bool:
    match scheme:
        case IntScheme():
            # Runtimes have kernels for zero points of these widths alone (vLLM).
            return scheme.symmetric or scheme.bits in (4, 8)
        case Float8Scheme(scales=scales):
            return scales != "block"
        case _:
            return isinstance(scheme, MicroscalingScheme)


def _ct_without_weight(scheme: Scheme) -> bool:
    if isinstance(scheme, MicroscalingScheme):
        return scheme.type != "mxfp8"
    return isinstance(scheme, IntScheme) and scheme.activations == "none"


def _ct_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    rows, columns = weight.shape
    match scheme:
        case IntScheme(bits=bits) if _ct_without_weight(scheme):
            groups = columns // (scheme.group_size or columns)
            zeros = [TensorHeader("weight_zero_point", (-(-rows * bits // 32), groups), "I32")]
            return [
                TensorHeader("weight_packed", (rows, -(-columns * bits // 32)), "I32"),
                TensorHeader("weight_scale", (rows, groups), weight.dtype),
                TensorHeader("weight_shape", (2,), "I64"),
                *(zeros if not scheme.symmetric else []),
            ]
        case IntScheme():
            scale = TensorHeader("weight_scale", (rows, 1), weight.dtype)
            return [TensorHeader("weight", (rows, columns), "I8"), scale]
        case Float8Scheme():
            shape = (rows, 1) if scheme.scales == "channel" else (1,)
            static = [TensorHeader("input_scale", (1,), weight.dtype)] if scheme.activations == "static" else []
            scale = TensorHeader("weight_scale", shape, weight.dtype)
            return [TensorHeader("weight", (rows, columns), "F8_E4M3"), scale, *static]
        case MicroscalingScheme():
            nvfp4 = scheme.type == "nvfp4"
            weight_too = ["weight_global_scale"] if nvfp4 else []
            inputs_too = ["input_global_scale"] if nvfp4 and scheme.activations == "dynamic" else []
            codes = TensorHeader("weight_packed", (rows, columns // 2), "U8")
            return [
                TensorHeader("weight", (rows, columns), "F8_E4M3") if scheme.type == "mxfp8" else codes,
                TensorHeader("weight_scale", (rows, columns // scheme.group_size), "F8_E4M3" if nvfp4 else "U8"),
                *(TensorHeader(name, (1,), "F32") for name in (*weight_too, *inputs_too)),
            ]
    raise AssertionError(f"{scheme.type} isn't held")


def _ct_family(config: Mapping[str, Any]) -> list[str]:
    groups = [group for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    return [_ct_group_family(group, str(group.get("format") or config.get("format"))) for group in groups]


def _ct_group_family(group: Mapping[str, Any], form: str) -> str:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        if form.startswith(name):
            return f"{name}-w4a4" if inputs and name != "mxfp8" else name
    if weights.get("type") == "float":
        return "fp8"
    return "w8a8" if inputs and weights.get("num_bits") == 8 else f"w{weights.get('num_bits', 4)}"


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    says="symmetric int of 2 to 8 bits, asymmetric of 4 or 8 (for vLLM alone), a scheme of its own for each layer, "
    "int8 activations, fp8 with scales for each tensor or channel, mxfp4, mxfp8 and nvfp4",
    holds=_ct_holds,
    stored=_ct_stored,
    declares=lambda config: config.get("quant_method") == "compressed-tensors",
    family=_ct_family,
    per_layer_schemes=True,
    without_weight=_ct_without_weight,
    lists_unquantized=True,
    # The library decodes them to bfloat16 at run time, whatever dtype the model computes in.
    arithmetic=lambda config: "own" if any(kind in str(config.get("format")) for kind in ("fp4", "mxfp8")) else "any",
    needs=("compressed-tensors",),
    keeps=True,
    speculative=True,
    cache_declaration={
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
            "group_size": None,
            "observer": "static_minmax",
        }
    },
)


# ------------------------------------------------------------------------------------------ gptq and awq


def _plain_int(scheme: Scheme) -> IntScheme | None:
    """The scheme, if it is an integer scheme without activation rounding; otherwise None."""
    return scheme if isinstance(scheme, IntScheme) and scheme.activations == "none" else None


def _gptq_holds(scheme: Scheme) -> bool:
    plain = _plain_int(scheme)
    return plain is not None and plain.bits in (2, 3, 4, 8)


def _gptq_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    assert isinstance(scheme, IntScheme), "the format holds no other schemes"
    rows, columns = weight.shape
    groups = columns // (scheme.group_size or columns)
    return [
        TensorHeader("qweight", (columns * scheme.bits // 32, rows), "I32"),
        TensorHeader("qzeros", (groups, rows * scheme.bits // 32), "I32"),
        TensorHeader("scales", (groups, rows), "F16"),
        TensorHeader("g_idx", (columns,), "I32"),
    ]


def _is_gptq_v2(config: Mapping[str, Any]) -> bool:
    return (config.get("checkpoint_format") or config.get("format")) == "gptq_v2"


def _gptq(name: str, declares: Callable[[Mapping[str, Any]], bool]) -> Format:
    return Format(
        name=name,
        packed_on_card=True,
        says="int of 2, 3, 4 or 8 bits, symmetric or not, one scheme for all layers, dense models",
        holds=_gptq_holds,
        stored=_gptq_stored,
        declares=lambda config: config.get("quant_method") == "gptq" and declares(config),
        family=lambda config: [f"w{config.get('bits', 4)}"],
        scale_dtype="float16",
        multiple_OI=(32, 32),
        # Supported by the kernels of gptqmodel 7.6; 16 fails in its 4-bit CPU kernel.
        group_sizes=(32, 64, 128, 256, 512, 1024, None),
        keeps=True,
    )


GPTQ = _gptq("gptq", lambda config: not _is_gptq_v2(config))
GPTQ_V2 = _gptq("gptq-v2", _is_gptq_v2)


def _awq_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    assert isinstance(scheme, IntScheme), "the format holds no other schemes"
    rows, columns = weight.shape
    groups = columns // (scheme.group_size or columns)
    return [
        TensorHeader("qweight", (columns, rows // 8), "I32"),
        TensorHeader("qzeros", (groups, rows // 8), "I32"),
        TensorHeader("scales", (groups, rows), "F16"),
    ]


def _awq_holds(scheme: Scheme) -> bool:
    plain = _plain_int(scheme)
    return plain is not None and plain.bits == 4 and not plain.symmetric


AWQ = Format(
    name="awq",
    packed_on_card=True,
    says="asymmetric int of 4 bits, one scheme for all layers, dense models",
    holds=_awq_holds,
    stored=_awq_stored,
    declares=lambda config: config.get("quant_method") == "awq",
    family=lambda config: [f"w{config.get('bits', 4)}"],
    scale_dtype="float16",
    multiple_OI=(8, 1),
    # Supported by the kernels of gptqmodel 7.6.
    group_sizes=(16, 32, 64, 128),
    lists_unquantized=True,
    keeps=True,
)


# --------------------------------------------------------------------------------------------------- fp8


def _fp8_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    rows, columns = weight.shape
    return [
        TensorHeader("weight", (rows, columns), "F8_E4M3"),
        TensorHeader("weight_scale_inv", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), "F32"),
    ]


FP8 = Format(
    name="fp8",
    decodes_on_loading=True,
    says=f"fp8 with scales for each block of {FP8_BLOCK} x {FP8_BLOCK}",
    holds=lambda scheme: isinstance(scheme, Float8Scheme) and scheme.scales == "block",
    stored=_fp8_stored,
    declares=lambda config: config.get("quant_method") == "fp8",
    family=lambda config: ["fp8"],
    arithmetic=lambda config: "decoded",
    lists_unquantized=True,
    speculative=True,
)


# ------------------------------------------------------------------------------------------ bitsandbytes

# Elements of a block that share an absmax, and blocks whose absmax values share one under double quantization.
BNB_BLOCK, BNB_NESTED_BLOCK = 64, 256


def _bnb_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    count = weight.numel
    if isinstance(scheme, LlmInt8Scheme):
        rows = weight.shape[0]
        codes = TensorHeader("weight", weight.shape, "I8")
        return [codes, TensorHeader("SCB", (rows,), "F32"), TensorHeader("weight_format", (), "U8")]
    assert isinstance(scheme, FourBitFloatScheme), "the format holds no other schemes"
    blocks = -(-count // BNB_BLOCK)
    # The state is JSON; its length depends on the shape's digits by a few bytes.
    state = TensorHeader(f"weight.quant_state.bitsandbytes__{scheme.type}", (100,), "U8")
    nested = [
        TensorHeader("weight.nested_absmax", (-(-blocks // BNB_NESTED_BLOCK),), "F32"),
        TensorHeader("weight.nested_quant_map", (256,), "F32"),
    ]
    return [
        TensorHeader("weight", (-(-count // 2), 1), "U8"),
        TensorHeader("weight.absmax", (blocks,), "U8" if scheme.double_quantization else "F32"),
        TensorHeader("weight.quant_map", (16,), "F32"),
        state,
        *(nested if scheme.double_quantization else []),
    ]


def _bnb_family(config: Mapping[str, Any]) -> list[str]:
    return ["llm-int8" if config.get("load_in_8bit") else str(config.get("bnb_4bit_quant_type", "nf4"))]


BITSANDBYTES = Format(
    name="bitsandbytes",
    packed_on_card=True,
    says="nf4, fp4 and llm-int8",
    holds=lambda scheme: isinstance(scheme, FourBitFloatScheme | LlmInt8Scheme),
    stored=_bnb_stored,
    declares=lambda config: config.get("quant_method") == "bitsandbytes",
    family=_bnb_family,
    conv1d=True,
    experts=lambda scheme: "the library converts linear modules alone, and transformers fuses experts",
    arithmetic=lambda config: "own",
    needs=("bitsandbytes",),
    only_method="bitsandbytes",
)


# -------------------------------------------------------------------------------------------------- gguf


def _gguf_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    assert isinstance(scheme, GgmlScheme), "a layer has one type"
    rows, columns = weight.shape
    return [TensorHeader(f"weight_{scheme.kind}", (rows, ggml.TYPES[scheme.kind].row_bytes(columns)), "U8")]


def _gguf_family(config: Mapping[str, Any]) -> list[str]:
    mix = ggml.FILE_TYPES.get(config.get("file_type"))  # type: ignore[arg-type]
    return [mix.family] if mix else []


GGUF = Format(
    name="gguf",
    says="one file for llama.cpp, with a type for each tensor: " + ", ".join(mix.upper() for mix in ggml.FILE_TYPES),
    holds=lambda scheme: isinstance(scheme, GgufScheme | GgmlScheme),
    stored=_gguf_stored,
    declares=lambda config: config.get("quant_method") == "gguf",
    family=_gguf_family,
    per_layer_schemes=True,
    conv1d=True,
    container="file",
    arithmetic=lambda config: "own",
    only_method="ggml",
    keeps=True,
    towers=False,
    file_bytes=lambda scheme, matrices, config: (
        ggml.planned_bytes(scheme.mix, matrices, config) if isinstance(scheme, GgufScheme) else 0
    ),
    deviations=lambda scheme, matrices, config: (
        ggml.planned_fallbacks(scheme.mix, matrices, config) if isinstance(scheme, GgufScheme) else ()
    ),
)

# --------------------------------------------------------------------------------------------------- mlx


def _mlx_holds(scheme: Scheme) -> bool:
    if isinstance(scheme, MicroscalingScheme):
        return scheme.type in ("mxfp4", "nvfp4") and scheme.activations == "none"
    plain = _plain_int(scheme)
    return plain is not None and plain.bits in (2, 3, 4, 5, 6, 8)


def _mlx_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    rows, columns = weight.shape
    if isinstance(scheme, MicroscalingScheme):
        scales = TensorHeader("scales", (rows, columns // scheme.group_size), "U8")
        return [TensorHeader("weight", (rows, columns // 8), "U32"), scales]
    assert isinstance(scheme, IntScheme), "the format holds no other schemes"
    assert scheme.group_size is not None, "the format has no scale for a whole row"
    groups = columns // scheme.group_size
    return [
        TensorHeader("weight", (rows, columns * scheme.bits // 32), "U32"),
        TensorHeader("scales", (rows, groups), weight.dtype),
        TensorHeader("biases", (rows, groups), weight.dtype),
    ]


def _mlx_family(config: Mapping[str, Any]) -> list[str]:
    all_settings = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [_mlx_mode_family(given) for given in all_settings if "bits" in given]


def _mlx_mode_family(given: Mapping[str, Any]) -> str:
    return f"w{given['bits']}" if given.get("mode", "affine") == "affine" else str(given["mode"])


MLX = Format(
    name="mlx",
    says="int of 2, 3, 4, 5, 6 or 8 bits, symmetric or not, in groups of 32, 64 or 128, a scheme of its own for each "
    "layer, mxfp4 and nvfp4",
    holds=_mlx_holds,
    stored=_mlx_stored,
    # mlx-lm names no quantizer.
    declares=lambda config: "quant_method" not in config and {"bits", "group_size"} <= set(config),
    family=_mlx_family,
    per_layer_schemes=True,
    container="mlx-shards",
    group_sizes=(32, 64, 128),
    real_zeros=True,
    tensor_scales=False,
    outside=True,
    settings=mlx.settings,
    place=mlx.place,
    keeps=True,
    blocks=True,
)

# ------------------------------------------------------------------------------- transformers' quantizers


def _hf_stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    assert isinstance(scheme, TransformersScheme), "the format holds no other schemes"
    (rows, columns), expected = weight.shape, scheme.expected
    groups = rows * -(-columns // (expected.group_size or columns))
    codes = TensorHeader("_weight_qdata", (weight.numel * expected.bits // 8,), "U8")
    return [codes, TensorHeader("_weight_scale", (groups * expected.group_bits // 8,), "U8")]


def _of_no_other(config: Mapping[str, Any]) -> bool:
    others = (row for row in FORMATS.values() if row is not HF_QUANTIZER)
    return bool(config.get("quant_method")) and not any(row.declares(config) for row in others)


HF_QUANTIZER = Format(
    name="hf-quantizer",
    says="what a quantizer of the installed transformers makes and saves: torchao's int8, float8 and int4, and others",
    holds=lambda scheme: isinstance(scheme, TransformersScheme),
    stored=_hf_stored,
    declares=_of_no_other,
    family=lambda config: ["w4"],
    experts=lambda scheme: "transformers' quantizers convert linear modules alone, and transformers fuses experts",
    arithmetic=lambda config: "own",
    only_method="transformers",
    decoded=False,
)

FORMATS: dict[str, Format] = {
    row.name: row for row in (COMPRESSED_TENSORS, GPTQ, GPTQ_V2, AWQ, FP8, BITSANDBYTES, GGUF, MLX, HF_QUANTIZER)
}


# --------------------------------------------------------------------------------------------- look-ups


def _known(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(
            f"unknown format, got {name!r}; {meant(name, FORMATS)}Known are {', '.join(FORMATS)}; name one"
        )
    return name


FormatName = Annotated[
    str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(FORMATS), "title": "Format"})
]


def recognised(config: Mapping[str, Any]) -> Format | None:
    """The format that a ``quantization_config`` declares; None if it is unknown."""
    return next((row for row in FORMATS.values() if row.declares(config)), None)


def formats_that_hold(scheme: Scheme) -> list[str]:
    """Names of the formats that support a scheme, its group size included."""
    return [row.name for row in FORMATS.values() if row.holds(scheme) and group_size_held(row, scheme)]


def others_that_hold(fmt: str, scheme: Scheme) -> str:
    """The remedy for a scheme that a format doesn't support, as the end of an error message."""
    names = [name for name in formats_that_hold(scheme) if name != fmt]
    return f"format: {' or '.join(names)}" if names else "another scheme"


def formats_with_schemes_by_layer() -> str:
    """The formats that support a scheme per layer, as the end of an error message."""
    return f"format: {' or '.join(row.name for row in FORMATS.values() if row.per_layer_schemes)}"


def can_be_gathered(fmt: str) -> bool:
    """Whether artifacts of a format are one weight file each, so that several can share a repository."""
    return FORMATS[fmt].container == "file"


def gathered_formats() -> list[str]:
    """Names of the formats that can share a repository."""
    return [name for name in FORMATS if can_be_gathered(name)]


def group_size_held(row: Format, scheme: Scheme) -> bool:
    """Whether the format's readers have kernels for the group size of an integer scheme."""
    return row.group_sizes is None or not isinstance(scheme, IntScheme) or scheme.group_size in row.group_sizes


def check_holds(name: str, fmt: str, scheme: Scheme) -> None:
    """Refuse a scheme that the format doesn't support; ``name`` is the recipe's.

    Raises:
        ValueError: names both, and the formats that support it.
    """
    row = FORMATS[fmt]
    held = row.holds(scheme)
    if held and group_size_held(row, scheme):
        return
    fits = formats_that_hold(scheme)
    if held:
        assert row.group_sizes is not None
        sizes = ", ".join(map(_null_or, row.group_sizes))
        raise ValueError(
            f"recipe {name!r}: format {fmt!r}: group_size {_null_or(getattr(scheme, 'group_size', None))} is read by "
            f"no kernel; choose one of {sizes}" + (f", or format: {' or '.join(fits)}" if fits else "")
        )
    wanted = scheme.model_dump_json(exclude={"indivisible"})
    remedy = f"choose format: {' or '.join(fits)}" if fits else "no format that a runtime reads holds it"
    raise ValueError(f"recipe {name!r}: format {fmt!r} can't hold the scheme {wanted} (it holds {row.says}); {remedy}")


def _null_or(size: int | None) -> str:
    """A group size as a zoo file writes it."""
    return "null" if size is None else str(size)
