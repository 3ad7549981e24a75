"""What the scripts of archived libraries share: a checkpoint as transformers of their time reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers.engines.libraries import speak


def load(request: dict[str, Any], scratch: Path) -> Any:
    """The source's model in float32, loaded by a transformers 4 without a tensor missing or left over.

    float32, for a CPU multiplies halves slowly, and folded norms are rounded once, when they are stored.
    """
    import torch
    import transformers

    source = Path(request["source"])
    folder = linked(source, scratch)
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        trust_remote_code=request["trust_remote_code"],
        variant=request["variant"],
        output_loading_info=True,
    )
    wrong = [f"{what.replace('_', ' ')} {sorted(names)[:3]}" for what, names in loaded.items() if names]
    if wrong:
        raise speak.Refused(
            f"transformers {transformers.__version__} reads this checkpoint with {', '.join(wrong)}; leave engine out "
            "for quantmill's own"
        )
    return model.eval()


def linked(source: Path, scratch: Path) -> Path:
    """A folder in ``scratch`` with the source's files by links, and its config.json in the words of transformers 4."""
    folder = scratch / "source"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(older(config), indent=2) + "\n")
    return folder


def older(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5 in the words of transformers 4, which reads past those that it doesn't know.

    Raises:
        Refused: it has different rotary embeddings by layer type, which transformers 4 has no field for.
    """
    new = dict(config)
    if "dtype" in new:
        new.setdefault("torch_dtype", new.pop("dtype"))
    rotary = dict(new.pop("rope_parameters", None) or {})
    if any(isinstance(value, dict) for value in rotary.values()):
        raise speak.Refused(
            f"rope_parameters differ by layer type ({', '.join(rotary)}), which a transformers 4 can't read; leave "
            "engine out for quantmill's own"
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rotary:
            new[name] = rotary.pop(name)
    if rotary.get("rope_type", "default") != "default":
        new["rope_scaling"] = rotary
    return new


def model_class(classes: dict[str, Any], model: Any, library: str) -> Any:
    """The library's class for a model's type.

    Raises:
        Refused: the library has none.
    """
    kind = model.config.model_type
    if kind not in classes:
        raise speak.Refused(
            f"{library} knows no models of type {kind!r} (it knows {', '.join(sorted(classes))}); leave engine out for "
            "quantmill's own"
        )
    return classes[kind]
