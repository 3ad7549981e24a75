"""Write a zoo file from a few answers: for ``quantmill quantize``, which runs it at once, and ``quantmill init``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.zoo import reference, shipped
from pipeline.zoo.zoo import Zoo, check, parse
from workers.errors import ZooError
from workers.spec.base import SLUG
from workers.spec.runtimes import TRANSFORMERS, runtime_named

# Tokens of the defaults; with them one model of 100 million parameters takes minutes on a few cores.
SAMPLES, SEQUENCE_LENGTH, HELD_OUT_TOKENS = 128, 512, 16384
OWN_TEXT = "Python's language reference, and modules of its standard library"
SCHEMA = "zoo.schema.json"
# Builders of the datasets library, by the suffix of a file.
BUILDERS = {".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
BUILDERS |= {".csv": "csv"}
HUB_DATASET = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+)?(:[\w.-]+)?$")


# What a first zoo makes for each runtime, unless a budget chooses: about four bits, and about eight where it's usual.
USUAL = {
    "transformers": ("bnb-nf4", "gptq-w4-g128"),
    "vLLM": ("gptq-w4-g128", "fp8-dynamic"),
    "llama.cpp": ("gguf-q4_k_m", "gguf-q8_0"),
    "mlx-lm": ("mlx-w4-g64", "mlx-w8-g64"),
}
REMARKS = (
    "What to quantize, how, on which text, and where it goes. `quantmill schema` describes every key.",
    "quantmill plan FILE shows what would be made; quantmill run FILE makes it.",
)
FIRST_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Calibration and held-out text for models of the Hub.
WIKITEXT = ("Salesforce/wikitext:wikitext-2-raw-v1:train", "Salesforce/wikitext:wikitext-2-raw-v1:test")


@dataclass(frozen=True)
class Draft:
    """The answers that make a zoo file; folders and files are relative to ``here``.

    ``calibration`` and ``held_out`` are text files, or data sets of the Hub as ORG/NAME[:CONFIG[:SPLIT]]; None: the
    project's own text. ``namespace`` None: nothing is published.
    """

    models: Sequence[str]
    recipes: Sequence[str]
    name: str | None = None
    namespace: str | None = None
    endpoint: str | None = None
    calibration: str | None = None
    held_out: str | None = None
    runtimes: Sequence[str] = ()
    remarks: Sequence[str] = ()
    here: Path = Path()


def usual(runtime: str | None) -> tuple[str, ...]:
    """The recipes of a first zoo for a runtime; None: any.

    Raises:
        ZooError: no such runtime.
    """
    try:
        return USUAL[runtime_named(runtime).name if runtime else TRANSFORMERS.name]
    except ValueError as error:
        raise ZooError(f"--runtime: {error}") from None


def loaded(draft: Draft, where: str) -> Zoo:
    """The zoo of a draft, checked as a zoo file is; its paths are relative to ``draft.here``.

    Raises:
        ZooError: what is wrong with it; ``where`` begins the message.
    """
    return check(parse(text(draft, draft.here), where), where)


def save(draft: Draft, path: Path) -> None:
    """Write a draft as the zoo file ``path``, and beside it the JSON Schema that its first line names.

    Raises:
        ZooError: the file exists already, can't be written, or wouldn't be a valid zoo.
    """
    if path.exists():
        raise ZooError(f"zoo file: {str(path)!r} exists already; name another file, or remove it")
    content = text(draft, path.parent)
    check(parse(content, str(path)), str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.with_name(SCHEMA).write_text(schema_text())
    except OSError as error:
        raise ZooError(f"zoo file: {str(path)!r} can't be written ({error.strerror}); name another file") from error


def on_own_text(draft: Draft) -> str | None:
    """What to tell of the text where a draft names none; None if it names all that its recipes need."""
    calibrated = any(shipped.recipe(name).calibrated for name in draft.recipes)
    lacking = [
        (what, option)
        for what, option, given in (
            ("calibrated", "--calibration", draft.calibration or not calibrated),
            ("compared", "--held-out", draft.held_out),
        )
        if not given
    ]
    if not lacking:
        return None
    does, options = (" and ".join(part) for part in zip(*lacking, strict=True))
    return f"{does} on quantmill's own text, {OWN_TEXT}; name text of your own by {options}"


def schema_text() -> str:
    """The JSON Schema of zoo files."""
    return json.dumps(reference.schema(), indent=1) + "\n"


def text(draft: Draft, folder: Path) -> str:
    """The text of a draft's zoo file that lies in ``folder``.

    Raises:
        ZooError: a text is neither a file nor a data set's name; or no recipe is named.
    """
    if not draft.recipes:
        raise ZooError(
            "recipes: none named; name one by --recipe NAME (`quantmill recipes` lists them, `quantmill recommend "
            "MODEL --memory 16GiB` chooses)"
        )
    recipes = list(dict.fromkeys(draft.recipes))
    calibrated = any(shipped.recipe(name).calibrated for name in recipes)
    lines = [f"# yaml-language-server: $schema={SCHEMA}", *(f"# {remark}" for remark in draft.remarks)]
    lines += [f"name: {_flow(draft.name or _name(draft.models))}", "", "models:"]
    lines += [f"  - id: {_flow(_placed(model, draft.here, folder))}" for model in dict.fromkeys(draft.models)]
    lines += ["", "# `quantmill recipes` lists them all; one of your own can be written in place."]
    lines += ["recipes:", *(_recipe_line(name) for name in recipes)]
    own = _own_text(draft.here, folder)
    if calibrated:
        dataset = _dataset(draft.calibration, "--calibration", draft, folder) if draft.calibration else own[0]
        lines += ["", "# The text that calibrated recipes learn from" + _whose(draft.calibration), "calibration:"]
        lines += [f"  dataset: {_flow(dataset)}", f"  samples: {SAMPLES}", f"  sequence_length: {SEQUENCE_LENGTH}"]
    dataset = _dataset(draft.held_out, "--held-out", draft, folder) if draft.held_out else own[1]
    lines += ["", "# Held-out text, on which each artifact is compared with its source" + _whose(draft.held_out)]
    lines += ["verify:", f"  dataset: {_flow(dataset)}", f"  tokens: {HELD_OUT_TOKENS}"]
    lines += [f"  sequence_length: {SEQUENCE_LENGTH}"]
    if draft.runtimes:
        lines += [f"  runtimes: {_flow(list(draft.runtimes))}   # each artifact is loaded in those that read it"]
    return "\n".join([*lines, "", *_publish(draft)]) + "\n"


def _publish(draft: Draft) -> list[str]:
    if draft.namespace is None:
        return [
            "# Nothing is published: what is made stays in --out. To publish, name your account, and set HF_TOKEN to a",
            "# token that may write:",
            "# publish: {namespace: your-name, private: true}",
        ]
    where: dict[str, Any] = {"namespace": draft.namespace, "private": True}
    if draft.endpoint:
        where = {"endpoint": draft.endpoint, **where}
    return [
        "# Accepted artifacts go there; on the Hub, HF_TOKEN has to be a token that may write.",
        f"publish: {_flow(where)}",
    ]


def _recipe_line(name: str) -> str:
    about = " ".join(shipped.recipe(name).description.split())
    return f"  - {name}" + (f"   # {about}" if about else "")


def _whose(given: str | None) -> str:
    return "." if given else f"; quantmill's own, {OWN_TEXT}:\n# text like that of your users says more."


def _own_text(here: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    calibration, held_out = shipped.own_text()
    return (
        {"path": "text", "data_files": [_relative(path, here, folder) for path in calibration]},
        {"path": "text", "data_files": [_relative(held_out, here, folder)]},
    )


def _dataset(given: str, option: str, draft: Draft, folder: Path) -> dict[str, Any]:
    path = draft.here / given
    if path.is_file():
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ZooError(
                f"{option}: the kind of {given!r} isn't known by its suffix, expected {', '.join(sorted(BUILDERS))}; "
                "rename the file, or write a zoo file (`quantmill init`) and name a builder as dataset.path"
            )
        return {"path": builder, "data_files": [_relative(Path(given), draft.here, folder)]}
    if not HUB_DATASET.match(given) or given.startswith(".") or path.suffix.lower() in BUILDERS:
        raise ZooError(
            f"{option}: no such file, got {given!r}; give a text file, or a data set of the Hub as "
            "ORG/NAME[:CONFIG[:SPLIT]]"
        )
    path_, name, split = [*given.split(":"), "", ""][:3]
    return {key: value for key, value in (("path", path_), ("name", name), ("split", split)) if value}


def _placed(model: str, here: Path, folder: Path) -> str:
    """A model as a zoo file in ``folder`` names it: a folder relative to that, a repository as it is."""
    return _relative(Path(model), here, folder) if (here / model).is_dir() else model


def _relative(path: Path, here: Path, folder: Path) -> str:
    """A path from ``here`` on as seen from ``folder``; absolute ones stay so."""
    if path.is_absolute():
        return str(path)
    seen = os.path.relpath((here / path).absolute(), folder.absolute())
    return seen if seen.startswith(".") else f"./{seen}"


def _name(models: Iterable[str]) -> str:
    """A name of a zoo, of its first model's."""
    first = next(iter(models), "zoo").rstrip("/").rpartition("/")[2].lower()
    cleaned = re.sub(r"[^a-z0-9._-]+", "-", first).strip("-._")[:64]
    return cleaned if SLUG.match(cleaned) else "zoo"


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
