"""The one module that touches transformers' internals: a model on the meta device, filled and emptied layer by layer.

transformers' own tables say which checkpoint key belongs to which parameter, and its own loader converts (renames,
fused experts). Both are internal to transformers 5.23; tests/workers/model/test_loading.py fails loudly when they move.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers.checkpoint.source import Header, TensorSource
from workers.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class KeyTarget:
    """Where a checkpoint key goes: a parameter or buffer, and the pattern of the series that the loader fuses it in."""

    owner: str
    series: str | None


class InputName(NamedTuple):
    """What is multiplied with an input: a parameter of the model, and the expert where one parameter holds many."""

    parameter: str
    expert: int | None

    @property
    def module(self) -> str:
        """The module in the model that has the parameter as its weight."""
        return self.parameter.removesuffix(".weight")


@dataclass(frozen=True)
class QuantizableWeight:
    """A matrix of a decoder layer that recipes turn into codes, by its name in the checkpoint.

    ``input`` names what it's multiplied with. Weights of different checkpoint keys that are fused in memory have the
    same input.
    """

    key: str
    layer: int
    input: InputName
    shape_OI: tuple[int, int]
    transposed: bool

    @property
    def module(self) -> str:
        """The module's name in the checkpoint: the key without its last part."""
        return self.key.rpartition(".")[0]


class StreamedModel:
    """A causal language model whose decoder layers are in memory one at a time.

    All weights lie on the meta device until ``load_outside`` and ``load_layer`` read them from ``source``.
    ``unexpected`` are the checkpoint's keys that the model has no use for.

    Raises:
        UnsupportedModel: a class that transformers doesn't know as a causal LM, or without a list of layers.
        CheckpointError: the checkpoint lacks a tensor that the model needs.
    """

    def __init__(
        self,
        folder: Path,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.model = build_on_meta(folder, dtype, trust_remote_code)
        self.layers_name, self.layers = find_layers(self.model)
        places = targets_of_keys(self.model, source.headers)
        self.owners = {key: place.owner for key, place in places.items()}
        self._keys_of_layer = self._by_layer(places)
        inside = {key for keys in self._keys_of_layer.values() for key in keys}
        self._outside = [key for key in source.headers if key not in inside]
        self.unexpected = tuple(key for key in self._outside if key not in places)
        self.weights = list(self._quantizable(places))
        self.outside_loaded = False
        # What ``reinitialized`` finds, once it's asked.
        self.unpackable: frozenset[str] | None = None

    @property
    def base_name(self) -> str:
        """The attribute of the model that is its decoder: a few classes have a wrong ``base_model_prefix``."""
        prefix: str = self.model.base_model_prefix
        return prefix if hasattr(self.model, prefix) else self.layers_name.partition(".")[0]

    @property
    def base(self) -> nn.Module:
        """The decoder without its head: what is streamed."""
        module: nn.Module = getattr(self.model, self.base_name)
        return module

    def keys_of_layer(self, index: int) -> list[str]:
        """The checkpoint's keys of one layer, in the checkpoint's order."""
        return self._keys_of_layer[index]

    @property
    def outside_keys(self) -> list[str]:
        """The checkpoint's keys that belong to no layer: embeddings, norms, the head, and all ``unexpected`` ones."""
        return self._outside

    def load_outside(self) -> None:
        """Load all that belongs to no layer, tie what is tied, and make the buffers that no checkpoint holds."""
        # What the model has no use for may be as large as a layer (the prediction heads of DeepSeek-V3).
        unexpected = set(self.unexpected)
        self._fill(key for key in self._outside if key not in unexpected)
        with _biases_as_they_are(self.model):
            self.model.tie_weights()
        _make_buffers(self.model, self.device)
        inside = tuple(f"{self.layers_name}.{index}." for index in range(len(self.layers)))
        self._check(name for name in _on_meta(self.model) if not name.startswith(inside))
        self.outside_loaded = True

    def load_layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Load one layer's weights: ``tensors`` by their checkpoint keys, or from the source."""
        if tensors is None:
            self._fill(self._keys_of_layer[index])
        else:
            load_tensors(self.model, tensors, self.dtype, self.device)
        prefix = f"{self.layers_name}.{index}."
        self._check(prefix + name for name in _on_meta(self.layers[index]))

    def free_layer(self, index: int) -> None:
        """Put one layer's weights back on the meta device; what is made, not loaded, stays."""
        stored = set(self.layers[index].state_dict())
        for name, tensor in [*self.layers[index].named_parameters(), *self.layers[index].named_buffers()]:
            if name in stored:
                _replace(self.layers[index], name, tensor)

    def _fill(self, keys: Iterable[str]) -> None:
        tensors = {key: self.source.read(key) for key in keys}
        load_tensors(self.model, tensors, self.dtype, self.device)

    def _check(self, missing: Iterable[str]) -> None:
        names = sorted(missing)
        if names:
            raise CheckpointError(
                f"checkpoint: no tensors for {names[:5]} of {type(self.model).__name__}; fetch the model again, "
                "or name a checkpoint that fits its config.json"
            )

    def _by_layer(self, places: Mapping[str, KeyTarget]) -> dict[int, list[str]]:
        pattern = re.compile(re.escape(self.layers_name) + r"\.(\d+)\.")
        found: dict[int, list[str]] = {index: [] for index in range(len(self.layers))}
        for key, place in places.items():
            match = pattern.match(place.owner)
            if match:
                found[int(match.group(1))].append(key)
        return found

    def _quantizable(self, places: Mapping[str, KeyTarget]) -> Iterator[QuantizableWeight]:
        """Linear layers, found by what they are: Linear, Conv1D, and matrices that are fused into 3-D parameters."""
        from transformers.pytorch_utils import Conv1D

        modules = dict(self.model.named_modules())
        keys_per_owner = Counter(place.owner for place in places.values())
        for layer, keys in self._keys_of_layer.items():
            position = _positions_in_series(keys, places)
            for key in sorted(keys, key=_natural):
                owner, shape = places[key].owner, self.source.headers[key].shape
                module_name, _, leaf = owner.rpartition(".")
                module = modules[module_name]
                if len(shape) != 2 or not key.endswith(".weight"):
                    continue
                if isinstance(module, nn.Linear) and leaf == "weight" and keys_per_owner[owner] == 1:
                    yield QuantizableWeight(key, layer, InputName(owner, None), (shape[0], shape[1]), False)
                elif isinstance(module, Conv1D) and leaf == "weight":
                    yield QuantizableWeight(key, layer, InputName(owner, None), (shape[1], shape[0]), True)
                elif key in position and getattr(module, leaf).dim() == 3:
                    name = InputName(owner, position[key])
                    yield QuantizableWeight(key, layer, name, (shape[0], shape[1]), False)
            self._check(_absent_experts(self.model, position, places))


def build_on_meta(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint's config, on the meta device, in ``eval`` mode.

    Raises:
        UnsupportedModel: transformers has no causal LM for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.use_cache = False
        # A checkpoint that is quantized is decoded before it gets here.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise UnsupportedModel(f"model {folder.name!r}: transformers builds no causal LM of it ({error})") from error
    if hasattr(model, "set_experts_implementation"):
        # The one that multiplies expert by expert: what each of them sees can be told apart.
        model.set_experts_implementation("eager")
    return model.eval()


def find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder's layers, with the name of their list: the outermost ModuleList that holds the most parameters.

    Lists of the model that reads text come before those of models for images and audio, however large they are.

    Raises:
        UnsupportedModel: there is no such list.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)
    ]
    if not outermost:
        raise UnsupportedModel(f"model {type(model).__name__}: found no list of decoder layers to stream")
    of_text = [(name, module) for name, module in outermost if _reads_text(model, name)]
    name, found = max(of_text or outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, list(found)


def _reads_text(model: nn.Module, name: str) -> bool:
    """Whether the innermost model that a module is part of is made by the text part of the config."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    owner = next((module for module in reversed(around) if isinstance(module, PreTrainedModel)), None)
    root = getattr(model, "config", None)
    return owner is not None and root is not None and type(owner.config) is type(root.get_text_config())


def owners_of_keys(model: Any, headers: Mapping[str, Header]) -> dict[str, str]:
    """For each checkpoint key that the model uses, the parameter or buffer that it goes into."""
    return {key: place.owner for key, place in targets_of_keys(model, headers).items()}


def targets_of_keys(model: Any, headers: Mapping[str, Header]) -> dict[str, KeyTarget]:
    """For each checkpoint key that the model uses, where transformers' loader puts it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    places = {}
    for key in headers:
        name, series = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, series = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state:
            places[key] = KeyTarget(name, series)
    return places


def _positions_in_series(keys: Iterable[str], places: Mapping[str, KeyTarget]) -> dict[str, int]:
    """Which slice of a fused parameter each key becomes: the loader stacks a series in natural order of its keys."""
    taken: Counter[KeyTarget] = Counter()
    positions = {}
    for key in sorted(keys, key=_natural):
        place = places[key]
        if place.series is not None:
            positions[key] = taken[place]
            taken[place] += 1
    return positions


def _absent_experts(model: nn.Module, fused: Iterable[str], places: Mapping[str, KeyTarget]) -> Iterator[str]:
    """Keys that are lacking in a series whose parameter holds more slices."""
    series = defaultdict(list)
    for key in fused:
        series[places[key]].append(key.split("."))
    for place, members in series.items():
        module, _, leaf = place.owner.rpartition(".")
        parameter = getattr(model.get_submodule(module), leaf)
        if parameter.dim() == 3 and 1 < len(members) < len(parameter):
            yield from _gaps(members, len(parameter))


def _gaps(members: Sequence[list[str]], count: int) -> Iterator[str]:
    """The names that a series counted from 0 to ``count`` lacks; of its members only the number differs."""
    column = next(index for index, parts in enumerate(zip(*members, strict=True)) if len(set(parts)) > 1)
    there = {parts[column] for parts in members}
    first = members[0]
    for number in map(str, range(count)):
        if number not in there:
            yield ".".join([*first[:column], number, *first[column + 1 :]])


def load_tensors(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
    """Put checkpoint tensors into the model through transformers' own loader.

    Raises:
        CheckpointError: a tensor has another shape than the model's parameter, or can't be converted.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    # A mapping remembers what it has matched: each call takes a fresh one.
    config = LoadStateDictConfig(
        dtype=dtype,
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
        # What a model keeps in float32 (a router's correction bias) whatever the dtype of the rest.
        dtype_plan=model._get_dtype_plan(dtype),
    )
    with _without_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    if info.mismatched_keys or info.conversion_errors or info.error_msgs:
        # A conversion's error is a whole traceback; its last line says what was wrong.
        errors = [f"{key}: {text.strip().splitlines()[-1]}" for key, text in info.conversion_errors.items()]
        found = [*sorted(map(str, info.mismatched_keys)), *errors, *info.error_msgs]
        raise CheckpointError(f"checkpoint: tensors don't fit the model's config.json, got {found[:3]}")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _biases_as_they_are(model: Any) -> Iterator[None]:
    """Tying pads a head's bias to the embedding's length before the bias itself is tied; here both have that length."""
    plain = model._adjust_bias
    model._adjust_bias = lambda *args: None
    try:
        yield
    finally:
        model._adjust_bias = plain


def _make_buffers(model: Any, device: str) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, masks), as the model's own initialization makes them.

    Raises:
        UnsupportedModel: it leaves one of them as it was.
    """
    from transformers import PreTrainedModel

    stored, owner = set(model.state_dict()), dict[str, Any]()
    made: dict[str, tuple[Any, nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        # Initialized by the innermost model that it is part of, as transformers does.
        owner[prefix] = module if isinstance(module, PreTrainedModel) else owner[prefix.rpartition(".")[0]]
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer.is_meta and name not in stored:
                module._buffers[leaf] = torch.full_like(buffer, _unset(buffer.dtype), device=device)
                made[name] = (owner[prefix], module, leaf)
    for by, module in {id(module): (by, module) for by, module, _ in made.values()}.values():
        by._init_weights(module)
    # Some are made for all layers at once, with what the model itself is initialized by.
    for by in {id(by): by for by, module, leaf in made.values() if _is_unset(module.get_buffer(leaf))}.values():
        by._init_weights(by)
    left = [name for name, (_, module, leaf) in made.items() if _is_unset(module.get_buffer(leaf))]
    if left:
        raise UnsupportedModel(
            f"model {type(model).__name__}: its own initialization doesn't make {left[:3]}, which no checkpoint holds; "
            "leave it out of the zoo"
        )


def _unset(dtype: torch.dtype) -> float | int | bool:
    """What a buffer holds before it is made: nothing that one ever holds throughout."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else int(torch.iinfo(dtype).min)


def _is_unset(buffer: Tensor) -> bool:
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().any())
    return buffer.dtype != torch.bool and buffer.numel() > 0 and bool((buffer == _unset(buffer.dtype)).all())


def _on_meta(module: nn.Module) -> list[str]:
    """Names of the stored tensors of a module that are still on the meta device."""
    return [name for name, tensor in module.state_dict().items() if tensor.is_meta]


def _replace(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    else:
        owner._buffers[leaf] = torch.empty_like(tensor, device="meta")


def _natural(key: str) -> Any:
    """Sort key in which layer 10 comes after layer 9: the loader's own."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)
