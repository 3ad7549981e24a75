"""What the libraries' scripts share: how they are asked and answer, and the files that they leave.

Imports nothing of quantmill; runs on Python 3.10.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Bytes of one file of weights, as everywhere in quantmill (spec.workspace.MAX_SHARD_BYTES).
SHARD = 2 * 10**9
# Distributions of the engines that have another name.
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}
FLOATS = ("F64", "F32", "F16", "BF16")


class Refused(Exception):
    """A library can't make what it's asked for; the message says why, and what to do."""


def main(make: Callable[[dict[str, Any]], list[str]]) -> None:
    """Read a request, have it made, and answer with its layout and the fallbacks that ``make`` returns."""
    request = json.loads(sys.stdin.readline())
    try:
        answer = answered(request, make(request))
    except MemoryError:
        raise
    except Refused as error:
        answer = {"error": str(error)}
    except Exception as error:
        if "out of memory" in str(error).lower() or "can't allocate" in str(error).lower():
            raise
        traceback.print_exc()
        remedy = "leave engine out for quantmill's own, or ignore the layer"
        answer = {"error": f"{type(error).__name__}: {error}; {remedy}"}
    print("\n" + json.dumps(answer), flush=True)


def progress(what: str) -> None:
    """Say what is being done, as a line of JSON."""
    print("\n" + json.dumps({"progress": what}), flush=True)


def layers(model: Any) -> None:
    """Say when a model's next decoder layer is run for the first time."""
    layer = re.compile(r"(^|\.)(layers|h|blocks)\.\d+$")
    numbered = {name: module for name, module in model.named_modules() if layer.search(name)}
    seen: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def say(*_: Any) -> None:
            if name not in seen:
                seen.add(name)
                progress(f"layer {len(seen)} of {len(numbered)}")

        return say

    for name, module in numbered.items():
        module.register_forward_pre_hook(hook(name))


def tokens_of(request: dict[str, Any]) -> list[list[int]]:
    """The calibration sequences; empty if there are none."""
    from safetensors.torch import load_file

    path = request["calibration"]
    return load_file(path)["tokens"].tolist() if path else []


def exactly(names: Iterable[str]) -> list[str]:
    """Regular expressions that match these names and no others."""
    return [f"^{re.escape(name)}$" for name in names]


def answered(request: dict[str, Any], fallbacks: list[str]) -> dict[str, Any]:
    """The answer: modules whose stored tensors aren't those of the source."""
    out = Path(request["out"])
    headers = _all_headers(out)
    wanted = request["modules"]
    made = [name for name in wanted if _is_coded(headers.get(f"{name}.weight"))]
    if not made:
        return {"error": f"the library quantized none of {len(wanted)} modules, as {wanted[:3]}; choose another engine"}
    left = sorted(set(wanted) - set(made))
    notes = [f"left in half precision by {request['recipe']['engine']}: {', '.join(left[:8])}"] if left else []
    layout = {"schemes": [request["recipe"]["scheme"]], "modules": dict.fromkeys(made, 0)}
    return {"layout": layout, "fallbacks": [*fallbacks, *notes], "versions": versions(request["recipe"]["engine"])}


def versions(library: str) -> dict[str, str]:
    """The library's version, by its name on PyPI."""
    library = DISTRIBUTIONS.get(library, library)
    try:
        return {library: importlib.metadata.version(library)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def names(folder: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors."""
    return set(_all_headers(folder))


def _all_headers(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: header for path in sorted(folder.glob("*.safetensors")) for name, header in _headers(path).items()}


def _headers(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        headers: dict[str, dict[str, Any]] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    headers.pop("__metadata__", None)
    return headers


def _is_coded(weight: dict[str, Any] | None) -> bool:
    return weight is None or weight["dtype"] not in FLOATS


class Folds:
    """Scales that a library folded, by keys of the checkpoint, as ``formats.folded`` applies them to the source.

    Of a weight [O, I], ``columns`` [I] multiply and ``rows`` [O] divide; of a norm or a bias, ``rows`` divide.
    """

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}
        self.rows: dict[str, Any] = {}

    def add(self, before: str, module: Any, after: Iterable[str], scale_I: Any) -> None:
        """Record that the last outputs of ``module``, called ``before``, are divided by the scales of its sinks."""
        import torch

        scale_I = scale_I.detach().float().cpu().flatten()
        for name in after:
            self.columns[f"{name}.weight"] = scale_I * self.columns.get(f"{name}.weight", 1.0)
        for leaf, parameter in module.named_parameters(recurse=False):
            ones = torch.ones(len(parameter) - len(scale_I))
            scale_O = torch.cat([ones, scale_I])
            self.rows[f"{before}.{leaf}"] = scale_O * self.rows.get(f"{before}.{leaf}", 1.0)

    def save(self, folder: str) -> None:
        """Write the file that ``formats.folded`` reads."""
        from safetensors.torch import save_file

        kinds = {"columns": self.columns, "rows": self.rows}
        vectors = {f"{kind}|{key}": vector for kind, by_key in kinds.items() for key, vector in by_key.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(vectors, Path(folder) / "scales.safetensors")

    def divided(self, name: str, plain: Any) -> Any:
        """A norm or a bias of the source with its folds, in its dtype; None if it has none."""
        if plain.dim() != 1 or name not in self.rows:
            return None
        return (plain.float() / self.rows[name]).to(plain.dtype)


def store(request: dict[str, Any], saved: Path, folds: Folds | None = None) -> None:
    """Write what a library saved into the request's folder: its codes, and the source's own other tensors.

    A tensor that the library left as it was, but in another dtype, or left out, is stored as the source has it; a norm
    or bias that it changed by the recorded folds alone as the source's divided by them; one that it changed otherwise
    as changed, which verification refuses. config.json is the source's, with the library's ``quantization_config``.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    source, out = Path(request["source"]), Path(request["out"])
    made, plain = _tensors(saved), _tensors(source, request.get("variant"))
    modules = set(request["modules"])
    stored = {name: tensor for name, tensor in made.items() if name not in plain or name.rpartition(".")[0] in modules}
    for name, plain_tensor in plain.items():
        module, _, leaf = name.rpartition(".")
        expected = folds.divided(name, plain_tensor) if folds else None
        if expected is not None and name in made and _near(made[name], expected):
            stored[name] = expected
        elif leaf == "weight" and module in modules:
            if name not in made and not any(key.startswith(f"{module}.") for key in made):
                stored[name] = plain_tensor
        elif name not in made or _alike(made[name], plain_tensor):
            stored[name] = plain_tensor
        else:
            stored[name] = made[name]
    if folds:
        folds.save(request["folds"])
    split = split_torch_state_dict_into_shards(stored, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: stored[name].contiguous() for name in names}, out / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    block = json.loads((saved / "config.json").read_text()).get("quantization_config")
    if not block:
        raise Refused("the library left no quantization_config; choose another engine")
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": block}, indent=2) + "\n")


def declare(saved: Path, words: dict[str, Any], *, instead: bool = False) -> None:
    """Add words to the ``quantization_config`` that a library saved, or write them instead of it."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = words if instead else config["quantization_config"] | words
    path.write_text(json.dumps(config, indent=2) + "\n")


def gptq_settings(request: dict[str, Any]) -> dict[str, Any]:
    """What auto-gptq's configuration and that of gptqmodel, its successor, call a recipe's scheme and options."""
    scheme, options = request["recipe"]["scheme"], request["recipe"]["options"]
    return {
        "bits": scheme["bits"],
        "group_size": scheme["group_size"] or -1,
        "sym": scheme["symmetric"],
        "desc_act": options["activation_order"],
        "damp_percent": options["damping"],
    }


def gptq_rows(request: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The calibration sequences as both take them."""
    return [{"input_ids": one, "attention_mask": [1] * len(one)} for one in tokens_of(request)]


def gptq_exceptions(request: dict[str, Any]) -> dict[str, Any]:
    """What the format gptq says of modules in the decoder's layers that aren't quantized, as ``formats.gptq`` does.

    The first list is transformers', the second gptqmodel's; libraries write at most the second, by which transformers
    takes what is left as it is for quantized, and fails.
    """
    block = re.split(r"\.\d+\.", request["modules"][0], maxsplit=1)[0]
    words = {"block_name_to_quantize": block, "checkpoint_format": "gptq", "lm_head": False}
    inside = [name for name in request["left"] if name.startswith(f"{block}.")]
    if not inside:
        return words
    listed = {"modules_in_block_to_quantize": [sorted(request["modules"])]}
    return {**words, **listed, "dynamic": {f"-:{name}": {} for name in exactly(inside)}}


def _tensors(folder: Path, variant: str | None = None) -> dict[str, Any]:
    from safetensors.torch import load_file

    pattern = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    return {name: tensor for path in sorted(folder.glob(pattern)) for name, tensor in load_file(path).items()}


def _alike(made: Any, plain: Any) -> bool:
    """Whether two tensors are the same but for rounding to the narrower of their dtypes."""
    import torch

    if made.shape != plain.shape or not made.dtype.is_floating_point:
        return False
    if made.dtype == plain.dtype:
        return bool(torch.equal(made, plain))
    return bool(torch.equal(plain.to(made.dtype), made) or torch.equal(made.to(plain.dtype), plain))


def _near(made: Any, expected: Any) -> bool:
    """Whether two tensors are the same but for rounding to half precision, twice."""
    import torch

    digits = 2.0**-7 if expected.dtype == torch.bfloat16 else 2.0**-9
    return bool(made.shape == expected.shape and torch.allclose(made.float(), expected.float(), rtol=digits, atol=1e-6))
