"""Check a model's config.json at the edge: types, model type, class, and the positions and tokens that it allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from workers.errors import CheckpointError, UnsupportedModel
from workers.spec.auto_classes import AUTO_CLASSES, classes, known_types
from workers.spec.bounds import LARGEST_NUMBER, parse_json
from workers.spec.families import DEFAULT_LOADER, family_of
from workers.spec.formats import recognised
from workers.spec.tensors import FLOATS, TensorHeader

CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel|LMHead)$")
# Names for the number of positions, in the order of looking: of most families; GPT-2; MPT, DBRX; CTRL; Bloom; XGLM.
POSITIONS: tuple[str, ...] = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "seq_length",
)
POSITIONS += ("max_target_positions", "seq_len", "max_seq_length")
# Keys of a composite config's part for text, or that holds it, in the order of looking.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
# A stored weight of an unquantized model is one of FLOATS; others are codes, whatever config.json says.
WEIGHT = re.compile(r"(\.|^)(weight|qweight|weight_packed|gate_up_proj|down_proj|\w+_blocks)$")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _number(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST_NUMBER


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST_NUMBER


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("model_type", "transformers_weights", "dtype", "torch_dtype"), (_text, "text")),
    **dict.fromkeys(("quantization_config", "auto_map", "text_config"), (_mapping, "a mapping")),
    "architectures": (_names, "a list of class names"),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "num_hidden_layers"),
        (_count, "a whole number above 0"),
    ),
    **dict.fromkeys(
        (*POSITIONS, "num_experts_per_tok", "num_experts_per_token", "pad_token_id"), (_number, "a whole number")
    ),
}


def _levels(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config, and the parts of a composite one that describe its text model, each with its keys' prefix."""
    yield "", config
    for outer in TEXT_PARTS:
        part = config.get(outer)
        if isinstance(part, dict):
            yield f"{outer}.", part
            inner = part.get("text_config")
            if isinstance(inner, dict):
                yield f"{outer}.text_config.", inner


def setting(config: Mapping[str, Any], *names: str) -> Any:
    """The first of some settings that a config, or its text part, has; None if neither has any."""
    return next(
        (value for _, level in _levels(config) for name in names if (value := level.get(name)) is not None), None
    )


def parse_config(text: bytes, what: str) -> dict[str, Any]:
    """The content of config.json, with the keys that planning reads of the right types; null is as good as left out.

    Raises:
        CheckpointError: no JSON mapping, or a key of another type.
    """
    config = parse_json(text, f"{what}: config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{what}: config.json: expected a mapping, got {type(config).__name__}; replace it")
    for where, level in _levels(config):
        for key, (fits, expected) in _KEYS.items():
            value = level.get(key)
            if value is not None and not fits(value):
                raise CheckpointError(
                    f"{what}: config.json: {where}{key}: expected {expected}, got {repr(value)[:80]}; "
                    "correct it as in the original model"
                )
    return config


def check_loadable(
    config: Mapping[str, Any], tensors: tuple[TensorHeader, ...], what: str, trusted: bool, *, kept: bool = False
) -> None:
    """Refuse what can't be quantized, by config.json and headers; ``kept``: it is quantized, and its codes are kept.

    Raises:
        UnsupportedModel: no causal LM, an unknown model type, code of its own, quantized already, or without layers.
    """
    if config.get("auto_map") and not trusted:
        raise UnsupportedModel(
            f"{what} comes with code of its own (auto_map in config.json), which is not run; "
            "read that code, then set trust_remote_code: true for this model"
        )
    if not kept:
        _check_quantized(config, tensors, what)
    _check_class(config, what)
    if tensors and not any(len(tensor.shape) > 1 for tensor in tensors if re.search(r"\.\d+\.", tensor.name)):
        names = [tensor.name[:80] for tensor in tensors[:3]]
        raise UnsupportedModel(
            f"{what} holds no layers of a model, got tensors {names}; a head or an adapter goes with its model: merge "
            "them, and name the result"
        )


def _check_quantized(config: Mapping[str, Any], tensors: tuple[TensorHeader, ...], what: str) -> None:
    declared = config.get("quantization_config")
    if declared:
        # mlx names no quantizer.
        method = str(declared.get("quant_method") or getattr(recognised(declared), "name", None))[:40]
        raise UnsupportedModel(
            f"{what} is quantized already, got quant_method {method!r}; name the original checkpoint, or take recipes "
            "of method: keep alone, which store its codes in another format; if there is no original, set "
            "source: dequantize"
        )
    coded = next((t for t in tensors if t.dtype not in FLOATS and len(t.shape) > 1 and WEIGHT.search(t.name)), None)
    if coded is not None:
        raise UnsupportedModel(
            f"{what} is quantized already, though its config.json doesn't say so: {coded.name!r} is "
            f"stored as {coded.dtype}, expected one of {', '.join(sorted(FLOATS))}; name the original checkpoint"
        )


def _check_class(config: Mapping[str, Any], what: str) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    built = {name for auto in AUTO_CLASSES for name in (classes(auto.table).get(str(kind)),) if name}
    if architectures and not any(CAUSAL_LM.search(name) or name in built for name in architectures):
        raise UnsupportedModel(
            f"{what} has no causal LM head, got architectures {str(architectures)[:200]}; "
            "quantmill quantizes decoders (a class ...ForCausalLM or ...LMHeadModel), and multimodal models around one"
            + (f" ({' or '.join(sorted(built))})" if built else "")
        )
    own = config.get("auto_map") or {}
    if kind is None:
        if "AutoConfig" in own:
            return
        raise CheckpointError(f"{what}: config.json has no model_type; name a transformers checkpoint")
    if family_of(kind).loader != DEFAULT_LOADER or "AutoModelForCausalLM" in own:
        return
    known = known_types()
    if known and kind not in known:
        raise UnsupportedModel(
            f"{what}: transformers {_version()} has no causal LM for model_type {kind[:80]!r}"
            f"{_near(kind, known)}; update transformers, correct config.json, or leave the model out"
        )


def _near(kind: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(kind, sorted(known), n=1)
    return f" (it has {close[0]!r})" if close else ""


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("transformers")


def pad_problem(config: Mapping[str, Any]) -> str | None:
    """Why no embedding can be built with the config's padding token; None if one can."""
    for _, level in _levels(config):
        pad, rows = level.get("pad_token_id"), level.get("vocab_size")
        if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
            return f"pad_token_id: got {pad}, but vocab_size is {rows}; correct config.json, as in the original model"
    return None


def positions(config: Mapping[str, Any]) -> int | None:
    """The number of positions that a config allows, under whatever name; None if it says none."""
    for _, level in _levels(config):
        for name in POSITIONS:
            value = level.get(name)
            if type(value) is int and value > 0:
                return value
    return None
