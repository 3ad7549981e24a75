"""Folders that try to be misread, to crash, to hang, or to reach out of themselves; each made in code.

Each says what must become of it: refused by the plan, failed in a worker, or made all the same.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.hostile import base

Fate = Literal["refused", "fails", "made"]
INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000
SOME = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Hostile:
    """One folder: its maker, what must become of it, and words that the reason must have."""

    name: str
    make: Callable[[Path], object]
    fate: Fate = "refused"
    says: str = ""
    entry: str = ""  # more keys of its entry in the zoo


def all_of_them(canary: Path) -> list[Hostile]:
    """The corpus; ``canary`` is a private file outside of all folders."""
    made = [
        *_configs(), *_typed(), *_indices(canary), *_headers(), *_links(canary), *_weights(), *_companions(canary),
        *_tokenizers(), *_names(),
    ]  # fmt: skip
    assert len({each.name for each in made}) == len(made), "names of the corpus are its models' folders"
    return made


def _then(*changes: Callable[[Path], object], **settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        base.write(folder, settings)
        for change in changes:
            change(folder)

    return make


def _file(name: str, content: str | bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


# ------------------------------------------------------------------------------------------------ config.json


def _configs() -> Iterator[Hostile]:
    texts: dict[str, tuple[str | bytes, str]] = {
        "empty": ("", "not readable JSON"), "brace": ("{", "not readable JSON"), "nul": ("\0", "not readable JSON"),
        "not-utf8": (b"\xff\xfe{}", "not UTF-8"), "utf16": ('{"model_type": "llama"}'.encode("utf-16"), "not UTF-8"),
        "list": ("[]", "expected a mapping"), "string": ('"llama"', "expected a mapping"), "number": ("3", "mapping"),
        "null": ("null", "expected a mapping"), "deep": (DEEP, "nested too deeply"),
        "deep-object": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        "deep-within-limits": ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        "huge": ('{"a": "' + "x" * (17 * 2**20) + '"}', "larger than"),
        "long-number": ('{"vocab_size": ' + "9" * 10_000 + "}", "not readable JSON"),
        "html": ("<html><body>404</body></html>", "not readable JSON"),
        "lfs-pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "not readable JSON"),
        "no-model-type": ("{}", "no model_type"),
        "yaml": ("model_type: llama\n", "not readable JSON"),
    }  # fmt: skip
    for name, (content, says) in texts.items():
        yield Hostile(f"config-{name}", _then(_file("config.json", content)), says=says)
    yield Hostile("config-missing", _then(_without("config.json")), says="has no config.json")
    yield Hostile("config-is-a-folder", _then(_without("config.json"), lambda f: (f / "config.json").mkdir()))
    classes: dict[str, tuple[dict[str, Any], str]] = {
        "unknown-type": ({"model_type": "llama9"}, "no causal LM for model_type 'llama9'"),
        "empty-type": ({"model_type": ""}, "no causal LM"),
        "control-type": ({"model_type": "lla\x1b[31mma"}, r"lla\x1b[31mma"),
        "long-type": ({"model_type": "x" * 100_000}, "no causal LM"),
        "path-type": ({"model_type": "../../llama"}, "no causal LM"),
        "t5": ({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]}, "no causal LM"),
        "encoder": ({"architectures": ["BertForMaskedLM"]}, "no causal LM head"),
        "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "no causal LM head"),
        "code": ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "trust_remote_code"),
        "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
        "quantized-nameless": ({"quantization_config": {"bits": 4}}, "quantized already"),
        "quantized-control": ({"quantization_config": {"quant_method": "\x1b]0;x\x07"}}, "quantized already"),
        "few-positions": ({"max_position_embeddings": 8}, "8 positions"),
        "few-positions-of-mpt": ({"max_position_embeddings": None, "max_seq_len": 16}, "16 positions"),
        "few-positions-of-gpt2": ({"max_position_embeddings": None, "n_positions": 16}, "16 positions"),
    }  # fmt: skip
    classes["pad-beyond"] = {"pad_token_id": 260}, "pad_token_id: got 260, but vocab_size is 260"
    for name, (settings, says) in classes.items():
        yield Hostile(f"class-{name}", _then(**settings), says=says)
    explicit = {
        "parent": "../model.safetensors", "absolute": "/etc/passwd", "folder": "a/b.safetensors", "pickle": "x.bin",
        "missing": "other.safetensors", "dots": "..", "number": 3, "control": "\x1b.safetensors",
    }  # fmt: skip
    for name, value in explicit.items():
        yield Hostile(f"explicit-{name}", _then(transformers_weights=value), says="transformers_weights")


def _typed() -> Iterator[Hostile]:
    """A value of another type for every key that planning reads."""
    numbers = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
    wrong: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(numbers, ("64", 64.5, [64], {}, True, 0, -1, 2**60)),
        "max_position_embeddings": ("512", [512], {}, 1e9),
        "model_type": (3, ["llama"], {}, True),
        "architectures": ("LlamaForCausalLM", {"a": 1}, [3], [["LlamaForCausalLM"]]),
        "quantization_config": ("awq", ["awq"], 4),
        "auto_map": ("a.B", ["a.B"]),
        "text_config": ("llama", [1]),
        "dtype": (16, ["bfloat16"]),
    }
    for key, values in wrong.items():
        for number, value in enumerate(values):
            yield Hostile(f"type-{key}-{number}", _then(**{key: value}), says=key)


# ----------------------------------------------------------------------------------------------- the index


def _sharded(placed: Any) -> Callable[[Path], None]:
    """A model whose index places a tensor in ``placed``."""

    def make(folder: Path) -> None:
        base.write(folder)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        places = dict.fromkeys(base.shapes(), "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**places, SOME: placed}}))

    return make


def _indices(canary: Path) -> Iterator[Hostile]:
    names: dict[str, Any] = {
        "parent": "../secret.safetensors", "absolute": "/secret.safetensors", "canary": str(canary), "empty": "",
        "folder": "sub/model.safetensors", "dot": ".", "dots": "..", "nul": "a\0.safetensors", "pickle": "model.bin",
        "control": "\x1b[31m.safetensors", "backslash": "..\\secret.safetensors", "number": 3, "null": None,
        "list": ["model.safetensors"], "missing": "model-00009-of-00009.safetensors", "python": "modeling.py",
        "itself": INDEX, "long": "x" * 10_000 + ".safetensors", "url": "https://example.com/x.safetensors",
    }  # fmt: skip
    for name, placed in names.items():
        yield Hostile(f"index-{name}", _sharded(placed), says="index")
    texts: dict[str, str | bytes] = {
        "text-empty": "", "text-list": "[]", "text-deep": DEEP, "text-not-utf8": b'{"weight_map": {"\xff": "a"}}',
        "text-no-metadata": '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
        "text-no-map": '{"metadata": {}}', "text-map-is-list": '{"weight_map": [1]}', "text-no-shards":
        '{"weight_map": {}}',
    }  # fmt: skip
    for name, content in texts.items():
        change = _file(INDEX, content)
        yield Hostile(f"index-{name}", _then(_without("model.safetensors"), change), says="index")
    # transformers reads all that the shards hold, and takes the single file first: neither is misread.
    yield Hostile("index-forgets-a-tensor", _index_forgets, "made")
    yield Hostile("index-beside-a-single-file", _then(_file(INDEX, '{"weight_map": {"a": "old.safetensors"}}')), "made")


def _index_forgets(folder: Path) -> None:
    _sharded("model-00001-of-00001.safetensors")(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][SOME]
    (folder / INDEX).write_text(json.dumps(index))


# ------------------------------------------------------------------------------------------ safetensors headers


def _headers() -> Iterator[Hostile]:
    raw: dict[str, bytes] = {
        "empty": b"", "one-byte": b"\0", "seven-bytes": b"\0" * 7, "eight-zeros": b"\0" * 8,
        "length-of-everything": b"\xff" * 64, "length-beyond": (10**6).to_bytes(8, "little") + b"{}",
        "pickle": pickle.dumps({"a": 1}), "html": b"<html>" * 100,
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "not-json": base.safetensors(b"{{{{", b""), "list": base.safetensors(b"[]", b""),
        "not-utf8": base.safetensors(b'{"\xff": 1}', b""), "deep": base.safetensors(DEEP.encode(), b""),
        "deep-entry": base.safetensors(b'{"a":' * 3000 + b"1" + b"}" * 3000, b""),
        "huge-header": (110 * 10**6).to_bytes(8, "little") + b" " * 110,
    }  # fmt: skip
    for name, content in raw.items():
        yield Hostile(f"header-{name}", _then(_file("model.safetensors", content)), says="model.safetensors")
    whole = base.header_of(base.shapes())
    size = max(entry["data_offsets"][1] for entry in whole.values())
    entries: dict[str, Any] = {
        "entry-number": 3, "entry-list": [], "entry-null": None, "entry-empty": {},
        "no-shape": {"dtype": "BF16", "data_offsets": [0, 2]}, "no-offsets": {"dtype": "BF16", "shape": [1]},
        "no-dtype": {"shape": [1], "data_offsets": [0, 2]},
    }  # fmt: skip
    sound = {"dtype": "BF16", "shape": [128, 64], "data_offsets": whole[SOME]["data_offsets"]}
    odd: dict[str, dict[str, Any]] = {
        "shape-text": {"shape": "128"}, "shape-number": {"shape": 128}, "shape-null": {"shape": None},
        "shape-negative": {"shape": [-128, -64]}, "shape-float": {"shape": [128.0, 64]},
        "shape-bool": {"shape": [True]},
        "shape-huge": {"shape": [2**62, 2**62]}, "shape-nested": {"shape": [[128, 64]]}, "shape-less": {"shape": [128]},
        "dtype-unknown": {"dtype": "BF17"}, "dtype-number": {"dtype": 16}, "dtype-list": {"dtype": ["BF16"]},
        "offsets-text": {"data_offsets": "0"}, "offsets-one": {"data_offsets": [0]}, "offsets-back":
        {"data_offsets": [16384, 0]}, "offsets-negative": {"data_offsets": [-16384, 0]}, "offsets-beyond":
        {"data_offsets": [size, size + 16384]}, "offsets-overlap": {"data_offsets": [0, 16384]}, "offsets-float":
        {"data_offsets": [0.0, 16384.0]},
    }  # fmt: skip
    entries |= {name: {**sound, **change} for name, change in odd.items()}
    for name, entry in entries.items():
        content = base.safetensors(json.dumps({**whole, SOME: entry}).encode(), bytes(size))
        yield Hostile(f"header-{name}", _then(_file("model.safetensors", content)), says="model.safetensors")
    cut, longer = base.safetensors(whole)[:-100], base.safetensors(whole) + b"\0" * 100
    yield Hostile("data-truncated", _then(_file("model.safetensors", cut)), says="truncated")
    yield Hostile("data-longer", _then(_file("model.safetensors", longer)), says="longer than its header says")
    for dtype, bytes_ in (("F8_E4M3", 1), ("I8", 1), ("U8", 1), ("I32", 4)):
        coded = base.safetensors(base.header_of(base.shapes(), dtype, bytes_), bytes(bytes_ * size // 2))
        yield Hostile(f"codes-{dtype}", _then(_file("model.safetensors", coded)), says="quantized already")
    nothing = base.safetensors(b"{}", b"")
    yield Hostile("tensors-none", _then(_file("model.safetensors", nothing)), "fails")
    yield Hostile("twice-in-two-shards", _twice, "fails", "two shards")
    broken = {"model.layers.0.mlp.up_proj.weight\x1b[2J": [4, 4], **base.shapes()}
    named = base.safetensors(base.header_of({name: tuple(shape) for name, shape in broken.items()}))
    yield Hostile("tensor-with-control-characters", _then(_file("model.safetensors", named)), "made")
    lacking = {name: shape for name, shape in base.shapes().items() if "layers.1.mlp" not in name}
    yield Hostile(
        "tensors-lacking", _then(_file("model.safetensors", base.safetensors(base.header_of(lacking)))), "fails"
    )
    wide = {**base.shapes(), SOME: (64, 128)}
    yield Hostile(
        "tensor-of-another-shape", _then(_file("model.safetensors", base.safetensors(base.header_of(wide)))), "fails"
    )
    nan = base.safetensors(whole, b"\xff\x7f" * (size // 2))
    yield Hostile("tensors-of-nan", _then(_file("model.safetensors", nan)), "fails", "NaN")


def _twice(folder: Path) -> None:
    base.write(folder)
    first, second = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    (folder / second).write_bytes(base.safetensors(base.header_of({SOME: (128, 64)})))
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {**dict.fromkeys(base.shapes(), first), "x": second}})
    )


# -------------------------------------------------------------------------------- links and special files


def _link(name: str, target: Path | str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def _links(canary: Path) -> Iterator[Hostile]:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE", "chat_template.jinja", "a/b.json"):
        # The target's content doesn't matter: it must not be looked at.
        change = _nested_link(name, canary)
        yield Hostile(f"link-{name.replace('/', '-')}", _then(change), says="leads out of the folder")
    yield Hostile("link-relative", _then(_link("LICENSE", f"../{canary.name}")), says="leads out of the folder")
    yield Hostile("link-environment", _then(_link("notes.json", "/proc/self/environ")), says="leads out")
    yield Hostile("link-of-a-link", _then(_link("x", canary), _link("LICENSE", "x")), says="leads out")
    yield Hostile("link-zeros", _then(_link("tokenizer.json", "/dev/zero")), "fails", "tokenizer")
    yield Hostile("link-to-nothing", _then(_link("model.safetensors", "nowhere")), says="no weights")
    yield Hostile("link-in-a-circle", _then(_link("model.safetensors", "model.safetensors")), says="no weights")
    yield Hostile("link-to-a-folder", _then(_link("assets", canary.parent)), "made")
    yield Hostile("link-inside", _then(_file("x/LICENSE", "free"), _link("LICENSE", "x/LICENSE")), "made")
    yield Hostile("link-of-leftovers", _then(_link("optimizer.pt", canary), _link("wandb", canary.parent)), "made")
    for name, fate in (("config.json", "refused"), ("model.safetensors", "refused"), ("LICENSE", "made")):
        yield Hostile(f"pipe-{name}", _then(_fifo(name)), fate)  # type: ignore[arg-type]
    yield Hostile("socket", _then(_socket), "made")


def _nested_link(name: str, target: Path) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        _link(name, target)(folder)

    return make


def _fifo(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def _socket(folder: Path) -> None:
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(folder)  # a socket's path has at most 107 bytes
        try:
            made.bind("LICENSE")
        finally:
            os.chdir(here)


# ---------------------------------------------------------------------------------------- no model, or another's


def _alone(**files: str | bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, content in files.items():
            _file(name.replace("__", "."), content)(folder)

    return make


def _weights() -> Iterator[Hostile]:
    config = json.dumps(base.CONFIG)
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"})
    head = base.safetensors(base.header_of({"lm_head.weight": (260, 64)}))
    medusa = base.safetensors(base.header_of({"medusa_head.linear.weight": (64, 64)}))
    folders: dict[str, tuple[dict[str, str | bytes], str]] = {
        "empty-folder": ({}, "has no config.json"),
        "card-alone": ({"README__md": "# A model"}, "has no config.json"),
        "config-alone": ({"config__json": config}, "no weights"),
        "adapter": ({"adapter_config__json": adapter, "adapter_model__safetensors": head}, "adapter without its model"),
        "adapter-with-config": ({"config__json": config, "adapter_config__json": adapter}, "adapter without its model"),
        "head-alone": ({"config__json": config, "model__safetensors": head}, "holds no layers"),
        "medusa-head": ({"config__json": config, "model__safetensors": medusa}, "holds no layers"),
        "gguf": ({"config__json": config, "model__gguf": b"GGUF" + b"\0" * 64}, "GGUF"),
        "onnx": ({"config__json": config, "model__onnx": b"\0" * 64}, "no weights"),
        "tensorflow": ({"config__json": config, "tf_model__h5": b"\0" * 64}, "no weights"),
        "flax": ({"config__json": config, "flax_model__msgpack": b"\0" * 64}, "no weights"),
        "mistral": ({"config__json": config, "consolidated__safetensors": head, "params__json": "{}"}, "no weights"),
        "another-name": ({"config__json": config, "weights__safetensors": head}, "no weights"),
        "pickles": ({"config__json": config, "pytorch_model__bin": pickle.dumps({})}, "allow_pickle"),
        "pickle-index": ({"config__json": config, "pytorch_model__bin__index__json": "{}"}, "allow_pickle"),
        "torch-file": ({"config__json": config, "model__pt": pickle.dumps({})}, "no weights"),
        "variant-alone": ({"config__json": config, "model__fp16__safetensors": head}, "variant: fp16"),
        "shards-without-index": ({"config__json": config, "model-00001-of-00002__safetensors": head}, "without"),
    }  # fmt: skip
    for name, (files, says) in folders.items():
        yield Hostile(name, _alone(**files), says=says)
    yield Hostile("variant-missing", _then(), says="variant 'int7'", entry="variant: int7")
    # Allowed pickles are read as weights alone.
    for name, content in (
        ("pickle-that-runs", pickle.dumps(_Runs())),
        ("pickle-of-a-list", pickle.dumps([1, 2])),
        ("pickle-of-nothing", b""),
        ("pickle-bomb", b"(" * 100_000 + b"l."),
    ):
        files = {"config__json": config, "pytorch_model__bin": content}
        yield Hostile(name, _alone(**files), "fails", entry="allow_pickle: true")
    escaping = json.dumps({"metadata": {}, "weight_map": {"a": "../pytorch_model.bin"}})
    files = {"config__json": config, "pytorch_model__bin__index__json": escaping}
    yield Hostile("pickle-index-escapes", _alone(**files), says="index", entry="allow_pickle: true")


class _Runs:
    """Pickled, it asks for a command when it's loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


# ------------------------------------------------------------------------------- files beside, and tokenizers


def _companions(canary: Path) -> Iterator[Hostile]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
    )
    cards: dict[str, str | bytes] = {
        "yaml-bomb": f"---\n{bomb}---\n# x", "self": "---\na: &a [*a]\n---\n", "deep": f"---\na: {DEEP}\n---\n",
        "tags-mapping": "---\ntags: {a: b}\nlicense: [1, {}]\n---\n", "tags-nested": "---\ntags: [[a], {b: c}]\n---\n",
        "tags-number": "---\ntags: 3\nlicense: 2024-01-01\nlanguage: {x: y}\n---\n", "no-end": "---\ntags: [a",
        "list": "---\n- a\n---\n", "not-utf8": b"---\ntags: [\xff]\n---\n",
        "tagged": "---\n!!python/object:os.x {}\n---\n",
        "control": '---\nlicense: "\\e[31m"\ntags: ["\\u202e"]\n---\n', "pipeline": "---\npipeline_tag: [a]\n---\n",
        "huge": "---\n" + "a" * (5 * 2**20), "nul": "---\n\0\n---\n",
    }  # fmt: skip
    for name, content in cards.items():
        yield Hostile(f"card-{name}", _then(_file("README.md", content)), "made")
    settings: dict[str, str] = {
        "stop-strings": '{"stop_strings": ["a"]}', "beams": '{"num_beams": 4, "num_return_sequences": 4}',
        "penalty": '{"repetition_penalty": 9.0, "do_sample": true, "temperature": 0.0}', "text": '"x"',
        "broken": "{", "ids": '{"eos_token_id": "x", "pad_token_id": [1]}', "dict": '{"return_dict_in_generate": true}',
    }  # fmt: skip
    for name, content in settings.items():
        yield Hostile(f"generation-{name}", _then(_file("generation_config.json", content)), "made")
    beside = {"adapter_config.json": "{}", "adapter_model.safetensors": "x", "quantize_config.json": "{}", "x.npz": "x"}
    changes = [_file(name, content) for name, content in beside.items()]
    yield Hostile(
        "beside-others-weights", _then(*changes, _file("checkpoint-9/config.json", "{"), _file("wandb/x", "")), "made"
    )
    yield Hostile("beside-many-files", _then(*(_file(f"runs/{n}/x.json", "{}") for n in range(200))), "made")


def _tokenizers() -> Iterator[Hostile]:
    texts: dict[str, str | bytes] = {
        "empty": "", "brace": "{", "list": "[]", "not-utf8": b"\xff", "deep": DEEP, "no-model": '{"version": "1.0"}',
        "unknown-model": '{"version": "1.0", "model": {"type": "Evil"}}', "null": "null",
    }  # fmt: skip
    for name, content in texts.items():
        yield Hostile(f"tokenizer-{name}", _then(_file("tokenizer.json", content)), "fails", "tokenizer")
    yield Hostile("tokenizer-missing", _then(_without("tokenizer.json")), "fails", "tokenizer")
    configs = {
        "list": "[]",
        "brace": "{",
        "number": '{"tokenizer_class": 3}',
        "evil": '{"tokenizer_class": "os.system"}',
    }
    for name, content in configs.items():
        fate: Fate = "made" if name == "evil" else "fails"
        yield Hostile(f"tokenizer-config-{name}", _then(_file("tokenizer_config.json", content)), fate)
    many = json.loads(base.tokenizer())
    many["added_tokens"] += [
        {**many["added_tokens"][0], "id": 259 + number, "content": word} for number, word in enumerate(("line", "the"))
    ]
    yield Hostile(
        "tokenizer-beyond", _then(_file("tokenizer.json", json.dumps(many))), "fails", "embedding has 260 rows"
    )


# ------------------------------------------------------------------------------------------------------ names


def _names() -> Iterator[Hostile]:
    for name in (
        "a b",
        "My Model (v2)",
        "-x",
        "x--y",
        "名前",
        "x" * 120,
        "a..b",
        "$(touch pwned)",
        "a;b",
        "%s{0}",
    ):
        yield Hostile(name, _then(), says="set as: ")
    yield Hostile("Same-Name", _then(_file("LICENSE", "1")), says="upper from lower")
    yield Hostile("same-name", _then(_file("LICENSE", "2")), says="upper from lower")
