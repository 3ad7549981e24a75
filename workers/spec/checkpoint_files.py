"""Which files of a folder or repository are the checkpoint, in transformers' own order. Pure: names and sizes in.

The order is that of ``_get_resolved_checkpoint_files`` (transformers 5.23): the file that config.json names as
``transformers_weights``; model.safetensors; model.safetensors.index.json; the same names with ``.bin`` for pickles.
A variant (``fp16``) stands before the last suffix of each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from workers.errors import CheckpointError, UnsupportedModel
from workers.spec.bounds import INDEX_BYTES, parse_json

CONFIG = "config.json"
# What quantmill adds to an artifact beside its card: the manifest, and the card's chart.
MANIFEST, CHART = "quantmill.json", "quantmill.png"
# Suffixes of the weight files of artifacts.
WEIGHTS = (".safetensors", ".gguf")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
# Files at the top of a checkpoint that are rewritten for the artifact.
REPLACED = frozenset({CONFIG, "README.md", MANIFEST, CHART, ".gitattributes"})
# Largest companion file in bytes; the largest tokenizer.json published is 35 MB.
COMPANION_BYTES = 512 * 2**20
OTHER = "not a file that loading needs"

_TRAINING, _OTHER_FORMAT = "left over from training", "of another format or runtime"
_FOLDERS: dict[str, str] = {
    "checkpoint-*": _TRAINING, "global_step*": _TRAINING, "runs": _TRAINING, "wandb": _TRAINING, "mlruns": _TRAINING,
    "logs": _TRAINING, "lightning_logs": _TRAINING, "tensorboard": _TRAINING, "original": _OTHER_FORMAT,
    "onnx": _OTHER_FORMAT, "openvino": _OTHER_FORMAT, "coreml": _OTHER_FORMAT, "tensorflow": _OTHER_FORMAT,
    "tflite": _OTHER_FORMAT, "gguf": _OTHER_FORMAT, "mlx": _OTHER_FORMAT, "metal": _OTHER_FORMAT,
    ".*": "hidden", "__*": "hidden",
}  # fmt: skip
_FILES: dict[str, str] = {
    ".*": "hidden", "__*": "hidden",
    "adapter_*": "of an adapter, which transformers would load instead of the artifact where peft is installed",
    "consolidated*": _OTHER_FORMAT, "params.json": _OTHER_FORMAT, "openvino_*": _OTHER_FORMAT,
    "hf_quant_config.json": "describes another quantization", "quantize_config.json": "describes another quantization",
    "quant_config.json": "describes another quantization",
    "training_args*": _TRAINING, "trainer_state.json": _TRAINING, "optimizer*": _TRAINING, "scheduler.*": _TRAINING,
    "rng_state*": _TRAINING, "*tfevents*": _TRAINING, "zero_to_fp32.py": _TRAINING, "*_results.json": _TRAINING,
    "*.index.json": "index of weights that aren't taken", "*.index.*.json": "index of weights that aren't taken",
}  # fmt: skip
# Suffixes of weights that are never copied; others that aren't companions are left out as well, without a name.
_WEIGHTS: dict[str, str] = {
    ".safetensors": "weights that transformers doesn't load", ".bin": "pickled, or of another format",
    ".pt": "pickled", ".pth": "pickled", ".ckpt": "pickled", ".gguf": _OTHER_FORMAT, ".ggml": _OTHER_FORMAT,
    ".onnx": _OTHER_FORMAT, ".onnx_data": _OTHER_FORMAT, ".tflite": _OTHER_FORMAT, ".litertlm": _OTHER_FORMAT,
    ".npz": _OTHER_FORMAT, ".npy": _OTHER_FORMAT, ".msgpack": _OTHER_FORMAT, ".h5": _OTHER_FORMAT,
    ".ot": _OTHER_FORMAT, ".mlmodel": _OTHER_FORMAT, ".nemo": _OTHER_FORMAT, ".pdparams": _OTHER_FORMAT,
    ".engine": _OTHER_FORMAT, ".pte": _OTHER_FORMAT, ".xml": _OTHER_FORMAT, ".keras": _OTHER_FORMAT,
}  # fmt: skip
# What is copied: tokenizers, templates, settings, code, documents and pictures.
_COMPANIONS: tuple[str, ...] = (
    ".json",
    ".model",
    ".jinja",
    ".jinja2",
    ".tiktoken",
    ".spm",
    ".vocab",
    ".bpe",
    ".codes",
    ".py",
    ".pyi",
)
_COMPANIONS += (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
# Texts only by name: a data set in the folder isn't the model's.
_COMPANION_NAMES: tuple[str, ...] = (
    "tokenizer",
    "vocab",
    "merges",
    "sentencepiece",
    "spiece",
    "license",
    "licence",
    "notice",
)
_COMPANION_NAMES += ("copying", "readme", "use_policy", "requirements", "chat_template", "preprocessor", "processor")
_COMPANION_NAMES += ("added_tokens", "special_tokens", "dict.", "tokens.")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.\w+)?\.safetensors")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint, by name relative to its folder.

    ``weights`` are in the order of reading, listed by ``index`` if there is one. ``companions`` are copied into
    artifacts unchanged. ``left_out`` says of each other file, or folder (ending in /), why it is left out.
    """

    weights: tuple[str, ...]
    index: str | None
    pickled: bool
    companions: tuple[str, ...]
    replaced: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def taken(self) -> tuple[str, ...]:
        """All files that are read or copied: what pins the content of a folder, and what is fetched."""
        index = (self.index,) if self.index else ()
        return tuple(sorted({*self.weights, *index, *self.companions, *self.replaced}))

    @property
    def other_checkpoints(self) -> tuple[str, ...]:
        """Weight files beside the taken ones that look like a second checkpoint of the same model."""
        names = [name for name, _ in self.left_out if "/" not in name]
        return tuple(name for name in names if name in (SINGLE, INDEX) or _is_variant(name))


def checkpoint_files(
    sizes: Mapping[str, int],
    read: Callable[[str], bytes],
    what: str,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> CheckpointFiles:
    """Resolve the files of a checkpoint from their names and sizes in bytes (-1: unknown).

    ``read`` returns a file's content; only config.json and the index are asked for. ``what`` begins the messages.
    ``left_out`` are folders that weren't listed, with the reason.

    Raises:
        CheckpointError: no weights that transformers loads, or an index that names something else than files beside it.
        UnsupportedModel: the weights are pickles, which aren't allowed.
    """
    explicit = _explicit(read(CONFIG), what) if CONFIG in sizes else None
    first, pickled = _first(sizes, explicit, variant, what)
    if pickled and not allow_pickle:
        raise UnsupportedModel(
            f"{what} has pickle weights only, got {first!r}; a pickle can run code. Convert it to safetensors, or set "
            "allow_pickle: true for this model (it is then read with weights_only=True)"
        )
    index = first if ".index." in first else None
    weights = _indexed(read(first), first, sizes, what, pickled) if index else (first,)
    companions, replaced, others = [], [], dict(left_out or {})
    taken = {*weights, index}
    for name in sorted(sizes):
        if name in taken:
            continue
        if name in REPLACED:
            replaced.append(name)
        elif reason := _left_out(name, sizes[name]):
            others[name] = reason
        else:
            companions.append(name)
    return CheckpointFiles(weights, index, pickled, tuple(companions), tuple(replaced), tuple(sorted(others.items())))


def folder_left_out(name: str) -> str | None:
    """Why a folder of that name isn't part of a checkpoint, or None: it needn't be looked into."""
    return next((reason for pattern, reason in _FOLDERS.items() if fnmatchcase(name, pattern)), None)


def safe_name(name: str) -> bool:
    """Whether a listed name is a path inside the folder that every file system and terminal can hold."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weight file or index in a variant: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _explicit(config: bytes, what: str) -> str | None:
    parsed = parse_json(config, f"{what}: {CONFIG}")
    declared = parsed.get("quantization_config") if isinstance(parsed, dict) else None
    whole = declared.get("file") if isinstance(declared, dict) else None
    if isinstance(whole, str) and whole.endswith(".gguf") and "/" not in whole and safe_name(whole):
        return whole
    value = parsed.get("transformers_weights") if isinstance(parsed, dict) else None
    if value is None:
        return None
    if (
        not isinstance(value, str)
        or "/" in value
        or not safe_name(value)
        or not value.endswith((".safetensors", INDEX))
    ):
        raise CheckpointError(
            f"{what}: {CONFIG}: transformers_weights: expected the name of a .safetensors file or index beside it, got "
            f"{str(value)[:200]!r}; correct or remove it"
        )
    return value


def _first(sizes: Mapping[str, int], explicit: str | None, variant: str | None, what: str) -> tuple[str, bool]:
    """The weight file or index that transformers loads, and whether it's a pickle."""
    if explicit is not None:
        if explicit not in sizes:
            raise CheckpointError(
                f"{what}: {CONFIG} names transformers_weights {explicit!r}, which isn't there; add it, or remove the "
                "key"
            )
        return explicit, False
    for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        if (varied := with_variant(name, variant)) in sizes:
            return varied, name.startswith(PICKLE)
    raise CheckpointError(f"{what} has no weights that transformers loads: {_instead(sizes, variant)}")


def _instead(sizes: Mapping[str, int], variant: str | None) -> str:
    """What a folder without weights holds, and what to do about it."""
    names = sorted(name for name in sizes if "/" not in name)
    variants = sorted({found for name in names if (found := _is_variant(name))})
    if "adapter_config.json" in names:
        return "it is an adapter without its model; merge it into its base model (merge_and_unload), and name that"
    if variant:
        remedy = f", but of {', '.join(variants)}; set variant to one" if variants else "; leave variant out"
        return f"no file of the variant {variant!r}{remedy}"
    if variants:
        return f"only files of the variant {variants[0]!r}; set variant: {variants[0]} for this model"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"it has shards without {INDEX}; add the index, or save the model anew"
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF files; name the original checkpoint"
    others = [name for name in names if name.endswith((".safetensors", *PICKLE_SUFFIXES, *_WEIGHTS))][:3]
    if others:
        return f"got {others}; expected {SINGLE}, or {INDEX} with its shards: rename it, or save the model anew"
    return f"got files {names[:8]}; expected {SINGLE}, or {INDEX} with its shards; name a folder that has them"


def _is_variant(name: str) -> str | None:
    """The variant in a weight file's name, if it has one."""
    match = re.fullmatch(r"model(?:-\d{5}-of-\d{5})?\.(\w+)\.safetensors|model\.safetensors\.index\.(\w+)\.json", name)
    return (match[1] or match[2]) if match else None


def _indexed(text: bytes, index: str, sizes: Mapping[str, int], what: str, pickled: bool) -> tuple[str, ...]:
    """The shards that an index names, in its order; its keys don't matter to transformers, which reads all of them."""
    parsed = parse_json(text, f"{what}: {index}", INDEX_BYTES)
    placed: Any = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{what}: {index}: weight_map must map keys to files; write the index anew, or remove it")
    if not isinstance(parsed.get("metadata"), dict):
        raise CheckpointError(f"{what}: {index} has no metadata, without which transformers doesn't load it; add {{}}")
    shards = tuple(dict.fromkeys(placed.values()))
    suffix = ".bin" if pickled else ".safetensors"
    strange = [name for name in shards if "/" in name or not safe_name(name) or not name.endswith(suffix)]
    if strange:
        raise CheckpointError(
            f"{what}: {index} names {strange[0][:200]!r}; expected the bare name of a {suffix} file beside it. "
            "Don't use this checkpoint unless you know why it points elsewhere"
        )
    missing = [name for name in shards if name not in sizes]
    if missing:
        raise CheckpointError(
            f"{what}: {index} names {[name[:80] for name in missing[:3]]}, but {len(missing)} of its {len(shards)} "
            "shards aren't there; complete the download"
        )
    return shards


def _left_out(name: str, size: int) -> str | None:
    """Why a file isn't copied into artifacts; None: it is."""
    if not safe_name(name):
        return "its name holds what not every system can store"
    path = PurePosixPath(name)
    for part in path.parts[:-1]:
        if reason := folder_left_out(part):
            return reason
    if reason := next((reason for pattern, reason in _FILES.items() if fnmatchcase(path.name, pattern)), None):
        return reason
    if reason := next((reason for suffix, reason in _WEIGHTS.items() if path.name.lower().endswith(suffix)), None):
        return reason
    known = path.suffix.lower() in _COMPANIONS or path.name.lower().startswith(_COMPANION_NAMES)
    if not known:
        return OTHER
    return None if size <= COMPANION_BYTES else f"larger than {COMPANION_BYTES // 2**20} MiB"


def summary(left_out: Iterable[tuple[str, str]]) -> str:
    """What is left out, for people: a few names for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out:
        if reason != "hidden":
            by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({reason})"
        for reason, names in by_reason.items()
    )
